#include "services/router/telemetry/balance.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/telemetry/route_counters.h"

namespace minke::router {
namespace {

using testing::DoubleNear;

// 8 experts in 4 groups of 2, 2 per row, at most 2 servers per row.
constexpr BalanceShape kShape{.experts_per_row = 2, .servers_per_row = 2};

LayerLoad Even() {
  LayerLoad load{.rows = 8,
                 .selections = std::vector<uint64_t>(8, 2),
                 .scores = std::vector<double>(8, 1.0),
                 .servers = {}};
  for (uint64_t s = 1; s <= 4; ++s) {
    ServerLoad server{.server = NodeId{s}, .rows = 4, .pairs = std::vector<uint64_t>(4, 0)};
    server.pairs[s - 1] = 4;
    load.servers.push_back(server);
  }
  return load;
}

TEST(Balance, IsOneWhenEven) {
  const LayerBalance balance = ComputeBalance(kShape, Even(), 4);
  EXPECT_DOUBLE_EQ(balance.expert, 1);
  EXPECT_DOUBLE_EQ(balance.device, 1);
  EXPECT_DOUBLE_EQ(balance.communication, 1);  // F = M: 16 (row, server) pairs of 8 rows
  EXPECT_DOUBLE_EQ(balance.expert_load_max, 1);
  EXPECT_DOUBLE_EQ(balance.device_load_max, 1);
  EXPECT_DOUBLE_EQ(balance.over_budget_fraction, 0);
}

TEST(Balance, CommunicationIsFOverMWhereRowsReachFewerServers) {
  LayerLoad load = Even();
  for (ServerLoad& server : load.servers) server.rows = 2;  // both experts of a row on one server: F = 1
  EXPECT_DOUBLE_EQ(ComputeBalance(kShape, load, 4).communication, 0.5);
  EXPECT_DOUBLE_EQ(ComputeBalance(kShape, load, 4).device, 1);
}

TEST(Balance, ASetOfExpertsThatTakesAllIsNOverK) {
  // The first two experts take all choices and all of the score: N/K = 4 each, on one of 4 servers.
  LayerLoad load{
      .rows = 8, .selections = {8, 8, 0, 0, 0, 0, 0, 0}, .scores = {4, 4, 0, 0, 0, 0, 0, 0}, .servers = {}};
  load.servers.push_back({NodeId{1}, 8, {16, 0, 0, 0}});
  const LayerBalance balance = ComputeBalance(kShape, load, 4);
  EXPECT_DOUBLE_EQ(balance.expert, 4);
  EXPECT_DOUBLE_EQ(balance.expert_load_max, 4);
  EXPECT_DOUBLE_EQ(balance.device, 4);
  EXPECT_DOUBLE_EQ(balance.device_load_max, 4);
  EXPECT_DOUBLE_EQ(balance.communication, 2);  // D/(M T) x T x 1
  EXPECT_DOUBLE_EQ(balance.over_budget_fraction, 0.75);
}

TEST(Balance, ReplicasShareAHotGroup) {
  LayerLoad load = Even();
  load.selections = {8, 0, 2, 2, 1, 1, 1, 1};
  load.servers[0].pairs = {4, 0, 0, 0};
  load.servers[1].pairs = {4, 4, 0, 0};  // has a replica of the hot group too
  load.servers[2].pairs = {0, 0, 2, 0};
  load.servers[3].pairs = {0, 0, 0, 2};
  const LayerBalance balance = ComputeBalance(kShape, load, 4);
  // P of a group: 0.25. f' = pairs x 4/16; P': half of the hot group's each.
  EXPECT_DOUBLE_EQ(balance.device, 1.0 * 0.125 + 2.0 * 0.375 + 0.5 * 0.25 + 0.5 * 0.25);
  EXPECT_DOUBLE_EQ(balance.device_load_max, 2);
  EXPECT_DOUBLE_EQ(balance.over_budget_fraction, 4.0 / 16);
}

TEST(Balance, SinceLeavesOutWhatCameBefore) {
  LayerLoad now = Even();
  const LayerLoad before = Even();
  now.rows += 3;
  now.selections[5] += 6;
  now.scores[5] += 3;
  now.servers[2].rows += 3;
  now.servers[2].pairs[2] += 6;
  const LayerLoad since = Since(now, before);
  EXPECT_EQ(since.rows, 3u);
  EXPECT_EQ(since.selections[5], 6u);
  EXPECT_EQ(since.selections[0], 0u);
  ASSERT_EQ(since.servers.size(), 1u);
  EXPECT_EQ(since.servers[0].server, NodeId{3});
}

class Counted : public testing::Test {
 protected:
  static ModelConfig Config() {
    ModelConfig config;
    config.num_hidden_layers = 2;
    config.first_k_dense_replace = 1;
    config.n_routed_experts = 8;
    config.num_experts_per_tok = 2;
    config.n_group = 4;
    config.topk_group = 2;
    config.topk_method = TopkMethod::kGroupLimitedGreedy;
    return config;
  }
  RouteCounters counters_{Config()};
};

TEST_F(Counted, RowsReachTheirServersOnceAndRejectedOnesCountNowhere) {
  const std::vector<uint16_t> experts = {0, 1, 0, 2, 4, 6};
  const GateResult results[] = {GateResult::kRouted, GateResult::kRouted, GateResult::kRejected};
  const std::vector<float> scores(3 * 8, 0.125f);
  // Groups 0 and 1 are on server 7, 2 and 3 on server 9.
  const NodeId none{}, a{7}, b{9};
  const std::vector<NodeId> servers = {a, none, none, none, a, a, none, none, none, none, b, b};
  counters_.Count(1, 3, experts.data(), results, scores.data(), servers);
  EXPECT_THAT(counters_.UnitRows(), testing::ElementsAre(2, 1, 0, 0));
  EXPECT_THAT(counters_.Selections()[0], testing::ElementsAre(2, 1, 1, 0, 0, 0, 0, 0));
  telemetry::Page page;
  counters_.Collect(page);
  const telemetry::Family& rows = *page.Find("minke:server_rows_total");
  ASSERT_EQ(rows.points.size(), 1u);
  EXPECT_EQ(rows.points[0].value, 2);
  EXPECT_EQ(rows.points[0].labels[1].second, ToString(a));
  const telemetry::Family& fan_out = *page.Find("minke:fan_out_servers");
  EXPECT_EQ(fan_out.points[0].histogram.counts[0], 2u);  // both rows reached one server
  EXPECT_EQ(page.Find("minke:fan_out_violations_total")->points[0].value, 0);
  const LayerBalance balance = counters_.Balance()[0].value();
  EXPECT_THAT(balance.expert, DoubleNear(1, 1e-6));  // all scores are equal
  EXPECT_DOUBLE_EQ(balance.expert_load_max, 4);      // expert 0 was chosen by 2 of 2 rows: N/K
}

TEST_F(Counted, TheWindowForgets) {
  const std::vector<float> scores(8, 0.125f);
  const std::vector<uint16_t> experts = {0, 1};
  const GateResult routed[] = {GateResult::kRouted};
  const std::vector<NodeId> servers = {NodeId{7}, {}, {}, {}};
  absl::Time now = absl::UnixEpoch();
  counters_.Tick(now);
  counters_.Count(1, 1, experts.data(), routed, scores.data(), servers);
  EXPECT_TRUE(counters_.Balance()[0].has_value());
  for (size_t i = 0; i < 2 * RouteCounters::kWindowParts; ++i)
    counters_.Tick(now += RouteCounters::kWindowPart);
  EXPECT_FALSE(counters_.Balance()[0].has_value());
  EXPECT_THAT(counters_.UnitRows(), testing::ElementsAre(1, 0, 0, 0));  // counters go on
}

TEST_F(Counted, ServersOfThePlacementWithoutRowsAreDevicesToo) {
  std::map<UnitId, cluster::ReplicaSet> units;
  for (uint32_t g = 0; g < 4; ++g) units[{1, g}] = {{NodeId{g + 1}}, {1}};
  counters_.SetPlacement(std::make_shared<PlacementTable>(Epoch{1, 1}, units));
  const std::vector<float> scores(8, 0.125f);
  const std::vector<uint16_t> experts = {0, 1};
  const GateResult routed[] = {GateResult::kRouted};
  counters_.Count(1, 1, experts.data(), routed, scores.data(), std::vector<NodeId>{NodeId{1}, {}, {}, {}});
  EXPECT_DOUBLE_EQ(counters_.Balance()[0]->device_load_max, 4);
  EXPECT_DOUBLE_EQ(counters_.Balance()[0]->over_budget_fraction, 0.75);
}

TEST_F(Counted, MoreServersThanTheModelAllowsAreAViolation) {
  const std::vector<float> scores(8, 0.125f);
  const std::vector<uint16_t> experts = {0, 2};
  const GateResult routed[] = {GateResult::kRouted};
  // Cannot happen: a row with two groups reaches two servers at most. Three groups are made up here.
  ModelConfig config = Config();
  config.num_experts_per_tok = 3;
  RouteCounters counters(config);
  const std::vector<uint16_t> three = {0, 2, 4};
  counters.Count(1, 1, three.data(), routed, scores.data(),
                 std::vector<NodeId>{NodeId{1}, NodeId{2}, NodeId{3}, {}});
  telemetry::Page page;
  counters.Collect(page);
  EXPECT_EQ(page.Find("minke:fan_out_violations_total")->points[0].value, 1);
  EXPECT_EQ(page.Find("minke:fan_out_limit")->points[0].value, 2);
}

}  // namespace
}  // namespace minke::router
