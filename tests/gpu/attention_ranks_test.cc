// Clusters whose attention node computes on GPUs: alone, and in ranks that share the model out.
#include <algorithm>
#include <fstream>

#include "gtest/gtest.h"
#include "libs/kernels/cuda/device.h"
#include "nlohmann/json.hpp"
#include "tests/support/local_cluster.h"

namespace minke::attention {
namespace {

using testing_support::Generation;
using testing_support::Greedy;
using testing_support::LocalCluster;

constexpr char kShipped[] = "models/minke-shakespeare";

// The golden text is f32's; bf16 may part from it where the best two are close, not early.
void ExpectGoldenText(int ranks) {
  std::ifstream file("tests/golden/shakespeare_greedy.json");
  const auto golden = nlohmann::json::parse(file);
  std::vector<inference::v1::Submit> requests;
  for (const auto& prompt : golden["prompts"]) {
    requests.push_back(Greedy(prompt["prompt_ids"].get<std::vector<uint32_t>>(),
                              static_cast<uint32_t>(prompt["ids"].size()), false));
  }
  LocalCluster cluster({.checkpoint = kShipped,
                        .precision = Precision::kBF16,
                        .experts = 2,
                        .attention_device = Device::kCuda,
                        .microbatches = 2,
                        .threads = 4,
                        .tensor_parallel = ranks});
  const std::vector<Generation> got = cluster.Run(requests);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(got[i].error.ok()) << got[i].error;
    const std::vector<uint32_t> want = golden["prompts"][i]["ids"];
    ASSERT_EQ(got[i].tokens.size(), want.size());
    const auto parts = std::mismatch(want.begin(), want.end(), got[i].tokens.begin()).first - want.begin();
    EXPECT_GE(parts, 12) << "prompt " << i;
  }
}

TEST(AttentionNodeOnGpu, GreedyTextIsGolden) { ExpectGoldenText(1); }

TEST(AttentionNodeOnGpu, GreedyTextOfTwoRanksIsGolden) {
  if (cuda::DeviceCount().value() < 2) GTEST_SKIP() << "one GPU here; this needs two";
  ExpectGoldenText(2);
}

}  // namespace
}  // namespace minke::attention
