#include "cli/plan/loads.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

ModelConfig Config(int layers) {
  ModelConfig config;
  config.num_hidden_layers = layers + 1;
  config.first_k_dense_replace = 1;
  config.n_routed_experts = 160;
  config.num_experts_per_tok = 6;
  config.topk_method = TopkMethod::kGroupLimitedGreedy;
  config.n_group = 8;
  config.topk_group = 3;
  return config;
}

TEST(CapShares, WhatIsAboveGoesToTheOthersInProportion) {
  const std::vector<double> shares = CapShares({6, 1, 2, 1}, 0.4);
  EXPECT_NEAR(shares[0], 0.4, 1e-12);
  EXPECT_NEAR(shares[1], 0.15, 1e-12);
  EXPECT_NEAR(shares[2], 0.3, 1e-12);
}

TEST(CapShares, TheRestMayReachTheCapToo) {
  const std::vector<double> shares = CapShares({100, 10, 1, 1}, 0.4);
  EXPECT_NEAR(shares[1], 0.4, 1e-12);
  EXPECT_NEAR(shares[3], 0.1, 1e-12);
}

TEST(CapShares, AllEqualWhereNothingElseFits) {
  EXPECT_EQ(CapShares({3, 1}, 0.5), (std::vector<double>{0.5, 0.5}));
}

TEST(LoadSource, EveryPatternKeepsTheNumberOfPairsAndTheCap) {
  for (const LoadPattern pattern : {LoadPattern::kZipf, LoadPattern::kDrifting, LoadPattern::kBursty}) {
    LoadSource source = LoadSource::Synthetic(
        Config(5), {.pattern = pattern, .zipf = 1.5, .noise = 0.3, .rows = 1000, .drift_period = 10});
    for (int i = 0; i < 50; ++i) {
      std::map<uint32_t, double> pairs;
      for (const router::UnitLoad& load : source.Next()) {
        pairs[load.unit.layer] += load.rows;
        EXPECT_LE(load.rows, 1000 * (1 + 1e-9)) << "a row visits a group at most once";
      }
      ASSERT_EQ(pairs.size(), 5u);
      for (const auto& [layer, sum] : pairs) EXPECT_NEAR(sum, 3000, 1e-6);
    }
  }
}

TEST(LoadSource, DriftMakesOtherGroupsHotWithoutJumps) {
  LoadSource source = LoadSource::Synthetic(
      Config(1), {.pattern = LoadPattern::kDrifting, .rows = 1000, .drift_period = 50, .seed = 2});
  std::vector<router::UnitLoad> first = source.Next(), last = first;
  double moved = 0;
  for (int i = 0; i < 200; ++i) {
    const auto now = source.Next();
    for (size_t g = 0; g < now.size(); ++g) {
      EXPECT_LT(std::abs(now[g].rows - last[g].rows), 100);
      moved = std::max(moved, std::abs(now[g].rows - first[g].rows));
    }
    last = now;
  }
  EXPECT_GT(moved, 300);
}

TEST(ParseLoads, ReadsRowsAndExperts) {
  ModelConfig config = Config(1);
  config.n_group = 2;
  const auto parsed = ParseLoads(config, R"({"intervals": [{"rows": [[5, 7]], "experts": [[2, 3]]}]})");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ((*parsed)[0][1].unit, (UnitId{1, 1}));
  EXPECT_EQ((*parsed)[0][1].rows, 7);
  EXPECT_EQ((*parsed)[0][1].experts, 3);
}

TEST(ParseLoads, NamesWhatIsWrong) {
  ModelConfig config = Config(1);
  config.n_group = 2;
  for (const char* bad : {"", "[]", R"({"intervals": []})", R"({"intervals": [{}]})"})
    EXPECT_FALSE(ParseLoads(config, bad).ok());
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  EXPECT_FALSE(ParseLoads(config, "{\"intervals\": [{\"rows\": " + deep + "}]}").ok());
  const auto negative = ParseLoads(config, R"({"intervals": [{"rows": [[5, -1]]}]})");
  EXPECT_THAT(std::string(negative.status().message()), testing::HasSubstr("intervals[0].rows[0][1]"));
}

}  // namespace
}  // namespace minke::cli
