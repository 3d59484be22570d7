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
  for (const UnitId unit : Units(20, 8)) units[unit] = Servers(3);
  const PlacementTable a({1, 1}, units), b({1, 2}, units);
  std::map<NodeId, int> chosen;
  for (const UnitId unit : Units(20, 8)) {
    const auto all = [](NodeId) { return true; };
    ASSERT_EQ(a.Choose(unit, all), b.Choose(unit, all));
    ++chosen[*a.Choose(unit, all)];
    const NodeId first = *a.Choose(unit, all);
    EXPECT_NE(a.Choose(unit, [&](NodeId server) { return server != first; }), first);
    EXPECT_EQ(a.Choose(unit, [](NodeId) { return false; }), std::nullopt);
  }
  for (const auto& [server, count] : chosen) EXPECT_GT(count, 160 / 6) << "units should spread";
}

TEST(PlacementTable, CountsUnitsWithoutServer) {
  const PlacementTable table({1, 1}, {{{0, 0}, {}}, {{0, 1}, {NodeId{3}}}});
  EXPECT_EQ(table.Missing(), 1);
  EXPECT_TRUE(table.Servers({5, 5}).empty());
}

}  // namespace
}  // namespace minke::router
