#include "services/router/placement/placement_table.h"

#include <map>
#include <vector>

#include "gtest/gtest.h"

namespace minke::router {
namespace {

std::vector<UnitId> Units(uint32_t layers, uint32_t groups) {
  std::vector<UnitId> units;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    for (uint32_t group = 0; group < groups; ++group) units.push_back({layer, group});
  }
  return units;
}
std::vector<NodeId> Servers(int n) {
  std::vector<NodeId> servers;
  for (int i = 1; i <= n; ++i) servers.push_back(NodeId{static_cast<uint64_t>(i)});
  return servers;
}

TEST(PlacementTable, AllRoutersChooseTheSameReplica) {
  std::map<UnitId, PlacementTable::Replicas> units;
  for (const UnitId unit : Units(20, 8)) units[unit] = {Servers(3), {}};
  const PlacementTable a({1, 1}, units), b({1, 2}, units);
  std::map<NodeId, int> chosen;
  for (const UnitId unit : Units(20, 8)) {
    const auto all = [](NodeId) { return true; };
    ASSERT_EQ(a.Choose(unit, 0, all), b.Choose(unit, 0, all));
    ++chosen[*a.Choose(unit, 0, all)];
    const NodeId first = *a.Choose(unit, 0, all);
    EXPECT_NE(a.Choose(unit, 0, [&](NodeId server) { return server != first; }), first);
    EXPECT_EQ(a.Choose(unit, 0, [](NodeId) { return false; }), std::nullopt);
  }
  for (const auto& [server, count] : chosen) EXPECT_GT(count, 160 / 6) << "units should spread";
}

TEST(PlacementTable, SharesRowsOutByWeights) {
  const PlacementTable table({1, 1},
                             {{{0, 0}, {Servers(3), {0.25f, 0, 0.75f}}}, {{0, 1}, {Servers(2), {0, 1}}}});
  EXPECT_TRUE(table.Split({0, 0}));
  EXPECT_FALSE(table.Split({0, 1}));
  const auto all = [](NodeId) { return true; };
  EXPECT_EQ(table.Choose({0, 0}, 0.2f, all), NodeId{1});
  EXPECT_EQ(table.Choose({0, 0}, 0.3f, all), NodeId{3});
  for (const float draw : {0.0f, 0.5f, 0.999f}) EXPECT_EQ(table.Choose({0, 1}, draw, all), NodeId{2});
  // Who is not usable is stood in for, by one with weight zero too.
  EXPECT_EQ(table.Choose({0, 1}, 0.5f, [](NodeId server) { return server != NodeId{2}; }), NodeId{1});
}

TEST(PlacementTable, KnowsWhetherEveryUnitIsServed) {
  const PlacementTable table({1, 1}, {{{0, 0}, {}}, {{0, 1}, {{NodeId{3}}, {}}}});
  EXPECT_FALSE(table.Served([](NodeId) { return true; }));
  EXPECT_TRUE(table.Servers({5, 5}).empty());
}

}  // namespace
}  // namespace minke::router
