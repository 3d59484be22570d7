// The cluster's numbers against the float64 oracle (tests/golden).
#include <algorithm>
#include <cmath>

#include "gtest/gtest.h"
#include "libs/base/mutex.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

class Parity : public testing::TestWithParam<const char*> {
 protected:
  const Golden& golden() { return Golden::Get(GetParam()); }
  ClusterOptions Options(Precision precision) {
    return {.checkpoint = golden().checkpoint, .precision = precision};
  }
};
INSTANTIATE_TEST_SUITE_P(Shapes, Parity, testing::Values("v2", "lite", "plain", "mscale"),
                         [](const auto& info) { return info.param; });

TEST_P(Parity, ExactPromptLogprobsMatchTheOracle) {
  LocalCluster cluster(Options(Precision::kExact));
  const Generation result = cluster.Run(Greedy(golden().input_ids, 0, true));
  ASSERT_TRUE(result.error.ok()) << result.error;
  EXPECT_EQ(result.finish, inference::v1::FINISH_REASON_LENGTH);
  EXPECT_TRUE(result.tokens.empty());
  EXPECT_LT(RelativeError(result.prompt_logprobs, golden().token_logprobs), 1e-4);
}

TEST_P(Parity, GreedyContinuationIsTheOraclesUpToANearTie) {
  LocalCluster cluster(Options(Precision::kExact));
  const Generation result =
      cluster.Run(Greedy(golden().greedy_prompt, static_cast<uint32_t>(golden().greedy_ids.size()), false));
  ASSERT_TRUE(result.error.ok()) << result.error;
  ASSERT_EQ(result.tokens.size(), golden().greedy_ids.size());
  for (size_t i = 0; i < result.tokens.size() && golden().greedy_gaps[i] >= 0.002; ++i) {
    ASSERT_EQ(result.tokens[i], golden().greedy_ids[i]) << "token " << i;
  }
}

TEST_P(Parity, RoutedExpertsAreTheOracles) {
  const ModelConfig config = ModelConfig::Load(golden().checkpoint).value();
  const int64_t layers = std::ssize(config.MoeLayers()), tokens = std::ssize(golden().input_ids),
                k = config.num_experts_per_tok;
  LocalCluster cluster(Options(Precision::kExact));
  ASSERT_TRUE(cluster.Run(Greedy(golden().input_ids, 0, false)).error.ok());
  // The router's counters are sums over the tokens: equal, layer by layer, wherever no margin is too small to
  // decide.
  const auto counts = cluster.router_engine().counters().Selections();
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::vector<uint64_t> want(config.n_routed_experts);
    bool decided = true;
    for (int64_t t = 0; t < tokens; ++t) {
      decided &= golden().routing_margins[layer * tokens + t] > 1e-5;
      for (int64_t i = 0; i < k; ++i) ++want[golden().routing[(layer * tokens + t) * k + i]];
    }
    ASSERT_TRUE(decided) << "choose another seed for this fixture";
    EXPECT_EQ(counts[layer], want) << "layer " << layer;
  }
}

TEST_P(Parity, Bf16WithFreeRoutingStaysClose) {
  LocalCluster cluster(Options(Precision::kBF16));
  const Generation result = cluster.Run(Greedy(golden().input_ids, 0, true));
  ASSERT_TRUE(result.error.ok()) << result.error;
  std::vector<double> errors;
  for (size_t i = 0; i < result.prompt_logprobs.size(); ++i) {
    errors.push_back(std::abs(result.prompt_logprobs[i] - golden().token_logprobs[i]) /
                     std::abs(golden().token_logprobs[i]));
  }
  ASSERT_EQ(errors.size(), golden().token_logprobs.size());
  std::sort(errors.begin(), errors.end());
  EXPECT_LE(errors[errors.size() / 2], 1e-2);
  EXPECT_LE(errors[errors.size() * 9 / 10], 3e-2);
}

TEST_P(Parity, Bf16WithForcedRoutingIsAsGoodAsRoundingAllows) {
  const ModelConfig config = ModelConfig::Load(golden().checkpoint).value();
  const std::vector<int32_t> moe_layers = config.MoeLayers();
  const int64_t tokens = std::ssize(golden().input_ids), k = config.num_experts_per_tok;
  ClusterOptions options = Options(Precision::kBF16);
  // One request in one step: a row's index in the exchange is its position.
  options.gate_override = [&](int32_t layer, uint32_t row, std::span<uint16_t> experts) {
    const int64_t index = std::find(moe_layers.begin(), moe_layers.end(), layer) - moe_layers.begin();
    for (int64_t i = 0; i < k; ++i)
      experts[i] = static_cast<uint16_t>(golden().routing[(index * tokens + row) * k + i]);
    return true;
  };
  LocalCluster cluster(options);
  const Generation result = cluster.Run(Greedy(golden().input_ids, 0, true));
  ASSERT_TRUE(result.error.ok()) << result.error;
  const double allowed = RelativeError(golden().bf16_forced_token_logprobs, golden().token_logprobs);
  EXPECT_LE(RelativeError(result.prompt_logprobs, golden().token_logprobs), 1.5 * allowed);
}

}  // namespace
}  // namespace minke
