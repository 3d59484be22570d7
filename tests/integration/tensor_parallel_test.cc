// An attention node of several ranks computes what one of a single rank does.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "gtest/gtest.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "nlohmann/json.hpp"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

// Golden shapes; "lite" (no compression of queries) with four heads instead of three, so that they can be
// shared out.
std::string CheckpointOf(const std::string& shape, const std::string& directory) {
  if (shape != "lite") return Golden::Get(shape).checkpoint;
  std::ifstream file("tests/golden/lite.json");
  nlohmann::json config = nlohmann::json::parse(file);
  config["num_attention_heads"] = config["num_key_value_heads"] = 4;
  EXPECT_TRUE(
      MakeCheckpoint({.directory = directory + "/lite", .config_json = config.dump(), .seed = 1}).ok());
  return directory + "/lite";
}

class TensorParallel : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Shapes, TensorParallel, testing::Values("v2", "lite", "plain"),
                         [](const auto& info) { return info.param; });

TEST_P(TensorParallel, RanksTogetherAgreeWithOne) {
  const testing_support::TempDir directory;
  const std::string checkpoint = CheckpointOf(GetParam(), directory.path());
  const std::vector<uint32_t> prompt = Golden::Get("v2").input_ids;
  int compared = 0;
  for (const Precision precision : {Precision::kExact, Precision::kBF16}) {
    ClusterOptions options{.checkpoint = checkpoint, .precision = precision};
    const auto run = [&](int ranks) {
      options.tensor_parallel = ranks;
      options.microbatches = 1 + ranks % 2;
      LocalCluster cluster(options);
      // Several at once, so that steps mix prompts and decoding.
      std::vector<inference::v1::Submit> batch(3, Greedy(prompt, 12, true));
      batch[1].mutable_prompt_token_ids()->Truncate(5);
      return cluster.Run(batch);
    };
    const std::vector<Generation> want = run(1);
    const int heads = Checkpoint::Open(checkpoint).value()->config().num_attention_heads;
    for (const int ranks : {2, 4}) {
      if (heads % ranks != 0) continue;
      ++compared;
      const std::vector<Generation> got = run(ranks);
      for (size_t i = 0; i < want.size(); ++i) {
        ASSERT_TRUE(got[i].error.ok()) << got[i].error;
        ASSERT_EQ(got[i].prompt_logprobs.size(), want[i].prompt_logprobs.size());
        std::vector<float> off;
        for (size_t t = 0; t < want[i].prompt_logprobs.size(); ++t) {
          const float value = want[i].prompt_logprobs[t];
          off.push_back(std::abs(got[i].prompt_logprobs[t] - value) / std::max(1.0f, std::abs(value)));
        }
        // Sums of a row are added in another order. In bf16 a near-tie may then route a row elsewhere, so
        // single rows prove nothing there.
        std::sort(off.begin(), off.end());
        const bool exact = precision == Precision::kExact;
        EXPECT_LT(exact ? off.back() : off[off.size() / 2], exact ? 1e-4f : 2e-2f)
            << ranks << " ranks, request " << i;
        if (exact) {
          EXPECT_EQ(got[i].tokens, want[i].tokens) << ranks << " ranks";
        }
      }
    }
  }
  EXPECT_GE(compared, 2);
}

}  // namespace
}  // namespace minke
