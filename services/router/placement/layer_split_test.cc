#include "services/router/placement/layer_split.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "gtest/gtest.h"

namespace minke::router {
namespace {

std::vector<ServerRate> Equal(int servers, double read = 0, double row = 1) {
  return std::vector<ServerRate>(servers, {read, row});
}

TEST(SplitLayer, AUnitThatMayNotSplitStaysWhole) {
  std::vector<LayerUnit> units = {{.rows = 8, .experts = 1, .replicas = {{0}, {1}}},
                                  {.rows = 6, .experts = 1, .replicas = {{0}, {1}}},
                                  {.rows = 3, .experts = 1, .replicas = {{0}, {1}}}};
  std::vector<double> times(2);
  EXPECT_DOUBLE_EQ(SplitLayer(units, Equal(2), times), 9);  // 8 | 6 + 3
  for (const LayerUnit& unit : units) {
    for (const LayerShare& share : unit.replicas) EXPECT_TRUE(share.rows == 0 || share.rows == unit.rows);
  }
}

TEST(SplitLayer, RowsFlowAlongAChainOfReplicas) {
  // 12 rows can reach server 2 only by pushing the other unit's rows there.
  std::vector<LayerUnit> units = {{.rows = 12, .split = true, .replicas = {{0}, {1}}},
                                  {.rows = 6, .split = true, .replicas = {{1}, {2}}}};
  std::vector<double> times(3);
  EXPECT_NEAR(SplitLayer(units, Equal(3), times), 6, 0.01);
}

TEST(SplitLayer, FasterServersTakeMore) {
  std::vector<LayerUnit> units = {{.rows = 12, .split = true, .replicas = {{0}, {1}}}};
  std::vector<double> times(2);
  EXPECT_NEAR(SplitLayer(units, std::vector<ServerRate>{{0, 1}, {0, 2}}, times), 8, 1e-9);
}

TEST(SplitLayer, AReplicaThatOnlyReadsTheWeightsAgainIsLeftOut) {
  // Alone 10 + 4; the other server is busy for 9 and would have to read for 10 more.
  std::vector<LayerUnit> units = {{.rows = 4, .experts = 10, .split = true, .replicas = {{0}, {1}}},
                                  {.rows = 9, .experts = 0, .replicas = {{1}}}};
  std::vector<double> times(2);
  EXPECT_DOUBLE_EQ(SplitLayer(units, Equal(2, 1), times), 14);
}

// Invariants over random layers: rows are conserved, shares are not negative, times are what the shares say,
// no unit that may not split is split, and splitting is never slower than keeping every unit whole.
TEST(SplitLayer, RandomLayersKeepTheInvariants) {
  std::mt19937_64 random(7);
  for (int run = 0; run < 2000; ++run) {
    const int servers = 1 + random() % 12, groups = 1 + random() % 8;
    std::vector<ServerRate> rates;
    for (int i = 0; i < servers; ++i) rates.push_back({(random() % 4) * 0.5, 1 + (random() % 3) * 0.5});
    std::vector<LayerUnit> units;
    for (int g = 0; g < groups; ++g) {
      LayerUnit& unit = units.emplace_back();
      unit = {.rows = 1.0 + random() % 100, .experts = 1.0 + random() % 20, .split = random() % 2 == 0};
      std::vector<int> order(servers);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int r = 0; r < std::min<int>(servers, 1 + random() % 4); ++r) unit.replicas.push_back({order[r]});
    }
    std::vector<LayerUnit> whole = units;
    for (LayerUnit& unit : whole) unit.split = false;
    std::vector<double> times(servers), whole_times(servers), expected(servers);
    const double time = SplitLayer(units, rates, times);
    EXPECT_LE(time, SplitLayer(whole, rates, whole_times) * (1 + 1e-9));
    for (const LayerUnit& unit : units) {
      double sum = 0;
      for (const LayerShare& share : unit.replicas) {
        EXPECT_GE(share.rows, 0);
        EXPECT_TRUE(unit.split || share.rows == 0 || share.rows == unit.rows);
        sum += share.rows;
        if (share.rows > 0)
          expected[share.server] +=
              unit.experts * rates[share.server].expert_read_s + share.rows * rates[share.server].row_s;
      }
      EXPECT_NEAR(sum, unit.rows, 1e-6);
    }
    for (int s = 0; s < servers; ++s) EXPECT_NEAR(times[s], expected[s], 1e-6);
    EXPECT_NEAR(time, *std::max_element(times.begin(), times.end()), 1e-9);
  }
}

}  // namespace
}  // namespace minke::router
