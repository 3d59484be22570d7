#include "services/router/placement/placement_table.h"

#include <random>
#include <set>

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

TEST(PlanAssignment, PutsEveryUnitOnAsManyDifferentServersAsAsked) {
  const auto units = Units(5, 8);
  for (const int n : {1, 2, 3, 4, 8, 16, 64}) {
    for (const int replicas : {1, 2, 3}) {
      const auto assignment = PlanAssignment(units, Servers(n), replicas, {});
      std::map<UnitId, int> copies;
      size_t least = units.size() * replicas, most = 0;
      for (const auto& [server, list] : assignment) {
        EXPECT_EQ(std::set<UnitId>(list.begin(), list.end()).size(), list.size());
        least = std::min(least, list.size());
        most = std::max(most, list.size());
        for (const UnitId unit : list) ++copies[unit];
      }
      EXPECT_EQ(copies.size(), units.size());
      for (const auto& [unit, count] : copies) EXPECT_EQ(count, std::min(n, replicas));
      EXPECT_LE(most - least, 1u) << n << " servers, " << replicas << " replicas";
    }
  }
}

TEST(PlanAssignment, LostServerMovesOnlyItsOwnUnits) {
  const auto units = Units(7, 8);
  const auto before = PlanAssignment(units, Servers(4), 1, {});
  std::vector<NodeId> rest = {NodeId{1}, NodeId{2}, NodeId{4}, NodeId{9}};
  const auto after = PlanAssignment(units, rest, 1, before);
  for (const uint64_t kept : {1, 2, 4}) {
    for (const UnitId unit : before.at(NodeId{kept})) {
      EXPECT_EQ(std::count(after.at(NodeId{kept}).begin(), after.at(NodeId{kept}).end(), unit), 1);
    }
  }
  EXPECT_EQ(after.at(NodeId{9}), before.at(NodeId{3}));  // the newcomer is the emptiest
}

TEST(PlanAssignment, NoServerHostsNothing) { EXPECT_TRUE(PlanAssignment(Units(1, 8), {}, 1, {}).empty()); }

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
  EXPECT_FALSE(table.Served([](NodeId) { return true; }));
  EXPECT_TRUE(table.Servers({5, 5}).empty());
}

}  // namespace
}  // namespace minke::router
