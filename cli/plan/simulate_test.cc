#include "cli/plan/simulate.h"

#include "gtest/gtest.h"

namespace minke::cli {
namespace {

ModelConfig V2() {
  ModelConfig config;
  config.num_hidden_layers = 60;
  config.first_k_dense_replace = 1;
  config.hidden_size = 5120;
  config.moe_intermediate_size = 1536;
  config.n_routed_experts = 160;
  config.num_experts_per_tok = 6;
  config.topk_method = TopkMethod::kGroupLimitedGreedy;
  config.n_group = 8;
  config.topk_group = 3;
  return config;
}

router::PlacementSnapshot Servers(int count, int slots_per_layer) {
  router::PlacementSnapshot pool;
  pool.shape = {.unit_bytes = 20 * 47.19e6, .experts = 20, .experts_per_row = 2, .flops_per_row = 94.4e6};
  for (int i = 0; i < count; ++i) {
    pool.servers.emplace_back().id = NodeId{static_cast<uint64_t>(i) + 1};
    pool.servers.back().slots = (59 * slots_per_layer + count - 1) / count;
  }
  return pool;
}

// The target: 8 groups on 8 servers, 16 slots per layer, Zipf 1.2 over groups.
TEST(Simulate, ReachesTheTargetBalance) {
  const auto results =
      Simulate(Servers(8, 16), LoadSource::Synthetic(V2(), {.zipf = 1.2}), {.intervals = 60});
  EXPECT_LT(results.front().balance, 0.5);
  EXPECT_GE(results.back().balance, 0.95);
  EXPECT_LT(results.back().step_s, 0.5 * results.back().static_step_s);
  EXPECT_EQ(results.back().loads, 0) << "it comes to rest";
}

TEST(Simulate, StaysBalancedUnderNoise) {
  const auto results =
      Simulate(Servers(8, 16), LoadSource::Synthetic(V2(), {.zipf = 1.2, .noise = 0.05}), {.intervals = 120});
  int64_t late = 0;
  for (int i = 60; i < 120; ++i) late += results[i].loads;
  EXPECT_LE(late, 6);
  EXPECT_GE(results.back().balance, 0.9);
}

TEST(Simulate, FollowsADrift) {
  const auto results = Simulate(
      Servers(8, 16), LoadSource::Synthetic(V2(), {.pattern = LoadPattern::kDrifting, .drift_period = 200}),
      {.intervals = 200});
  const IntervalResult overall = Overall(results);
  EXPECT_LT(overall.step_s, 0.75 * overall.static_step_s);
}

TEST(Simulate, RunsFrom1To320Servers) {
  for (const int servers : {1, 2, 4, 16, 64, 320}) {
    const auto results = Simulate(Servers(servers, 16), LoadSource::Synthetic(V2(), {}), {.intervals = 5});
    for (const IntervalResult& result : results) {
      EXPECT_GT(result.balance, 0);
      EXPECT_LE(result.balance, 1 + 1e-9);
      EXPECT_LE(result.fan_out, 3 + 1e-9);
      EXPECT_GE(result.fan_out, 1 - 1e-9);
    }
  }
}

TEST(FanOut, GroupsOnOneServerAreReachedTogether) {
  router::PlacementSnapshot pool = Servers(2, 16);
  pool.units = {{{1, 0}, 100}, {{1, 1}, 100}};
  const NodeId a{1}, b{2};
  EXPECT_NEAR(FanOut(pool, 2, {{{1, 0}, {{a, 1}}}, {{1, 1}, {{a, 1}}}}), 1, 1e-9);
  EXPECT_NEAR(FanOut(pool, 2, {{{1, 0}, {{a, 1}}}, {{1, 1}, {{b, 1}}}}), 2, 1e-9);
}

}  // namespace
}  // namespace minke::cli
