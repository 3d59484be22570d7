#include "services/router/placement/coordinator.h"

#include <random>
#include <set>

#include "gtest/gtest.h"

namespace minke::router {
namespace {

using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

constexpr uint32_t kLayers = 3, kGroups = 8;

CoordinatorOptions Options(int servers, int replicas = 1) {
  CoordinatorOptions options{
      .shape = {.unit_bytes = 1e6, .experts = 4, .experts_per_row = 2, .flops_per_row = 1e6},
      .replicas = replicas,
      .expert_servers = servers,
      .fresh_term = 7};
  for (uint32_t layer = 1; layer <= kLayers; ++layer) {
    for (uint32_t group = 0; group < kGroups; ++group) options.units.push_back({layer, group});
  }
  return options;
}

MemberReport Member(uint64_t id, cluster::v1::Role role) {
  MemberReport report;
  report.mutable_member()->set_node_id(id);
  report.mutable_member()->set_role(role);
  report.mutable_member()->set_ready(true);
  return report;
}

using Units = std::set<UnitId>;

// A cluster whose servers do what the record asks of them, one unit at a time in random order.
class World {
 public:
  explicit World(CoordinatorOptions options, uint32_t seed = 1)
      : options_(std::move(options)), random_(seed) {
    members_[NodeId{1000}] = Member(1000, cluster::v1::ROLE_ROUTER);
  }
  void Join(uint64_t id) { members_[NodeId{id}] = Member(id, cluster::v1::ROLE_EXPERT); }
  void Kill(uint64_t id) { members_.erase(NodeId{id}); }
  void Drain(uint64_t id) { members_[NodeId{id}].mutable_member()->set_draining(true); }
  void Lose(uint64_t id) { members_[NodeId{1000}].add_lost(id); }
  void FindAgain() { members_[NodeId{1000}].clear_lost(); }

  const PlacementRecord& Decide(int64_t now_ms = 1 << 30) {
    const PlacementRecord next = router::Decide(options_, members_, record_, now_ms);
    EXPECT_GE(next.epoch().counter(), record_.epoch().counter());
    record_ = next;
    return record_;
  }

  // One server loads one assigned unit, or lets go of one that is neither assigned nor published.
  bool Act() {
    std::vector<std::pair<NodeId, std::pair<UnitId, bool>>> possible;
    for (const auto& [id, report] : members_) {
      if (report.member().role() != cluster::v1::ROLE_EXPERT || Lost(id)) continue;
      const Units assigned = Assigned(id.value), hosted = Hosted(id.value);
      for (const UnitId unit : assigned) {
        if (!hosted.contains(unit)) possible.push_back({id, {unit, true}});
      }
      for (const UnitId unit : hosted) {
        if (!assigned.contains(unit) && !Published(unit).contains(id))
          possible.push_back({id, {unit, false}});
      }
    }
    if (possible.empty()) return false;
    const auto& [id, change] = possible[random_() % possible.size()];
    Units hosted = Hosted(id.value);
    change.second ? (void)hosted.insert(change.first) : (void)hosted.erase(change.first);
    MemberReport& report = members_[id];
    report.clear_hosted();
    for (const UnitId unit : hosted) {
      auto* out = report.add_hosted();
      out->set_layer(unit.layer);
      out->set_group(unit.group);
    }
    return true;
  }

  // Until nothing is left to do. `whole`: no unit may be without a server meanwhile.
  void Settle(bool whole) {
    for (int i = 0; i < 10'000; ++i) {
      Decide();
      CheckPublished(whole);
      if (!Act()) return;
    }
    FAIL() << "it never settles";
  }

  void CheckPublished(bool whole) const {
    ASSERT_EQ(record_.placement_size(), static_cast<int>(options_.units.size()));
    for (const auto& unit : record_.placement()) {
      EXPECT_TRUE(!whole || unit.node_ids_size() > 0);
      std::set<uint64_t> different(unit.node_ids().begin(), unit.node_ids().end());
      EXPECT_EQ(static_cast<int>(different.size()), unit.node_ids_size());
      for (const uint64_t id : unit.node_ids()) {
        EXPECT_TRUE(Hosted(id).contains({unit.unit().layer(), unit.unit().group()})) << id;
      }
    }
  }

  Units Hosted(uint64_t id) const {
    Units units;
    const auto it = members_.find(NodeId{id});
    if (it == members_.end()) return units;
    for (const auto& unit : it->second.hosted()) units.insert({unit.layer(), unit.group()});
    return units;
  }
  Units Assigned(uint64_t id) const {
    Units units;
    for (const auto& assignment : record_.assigned()) {
      if (assignment.node_id() != id) continue;
      for (const auto& unit : assignment.units()) units.insert({unit.layer(), unit.group()});
    }
    return units;
  }
  std::set<NodeId> Published(UnitId wanted) const {
    std::set<NodeId> servers;
    for (const auto& unit : record_.placement()) {
      if (UnitId{unit.unit().layer(), unit.unit().group()} != wanted) continue;
      for (const uint64_t id : unit.node_ids()) servers.insert(NodeId{id});
    }
    return servers;
  }
  bool Lost(NodeId id) const {
    for (const uint64_t lost : members_.at(NodeId{1000}).lost()) {
      if (lost == id.value) return true;
    }
    return false;
  }
  void ForgetRecord() { record_ = {}; }
  CoordinatorOptions& options() { return options_; }
  const PlacementRecord& record() const { return record_; }

 private:
  CoordinatorOptions options_;
  cluster::Members members_;
  PlacementRecord record_;
  std::mt19937 random_;
};

TEST(Decide, WaitsForTheExpectedPoolAndThenPlacesEverything) {
  World world(Options(2));
  world.Join(1);
  EXPECT_EQ(world.Decide().waiting_for(), "expert servers: 1 of 2 joined");
  EXPECT_EQ(world.record().assigned_size(), 0);
  EXPECT_EQ(world.record().epoch().term(), 7u);
  world.Join(2);
  world.Settle(/*whole=*/false);
  EXPECT_EQ(world.record().waiting_for(), "");
  EXPECT_EQ(world.Hosted(1).size(), 12u);
  EXPECT_EQ(world.Hosted(2).size(), 12u);
  world.CheckPublished(/*whole=*/true);
  const PlacementRecord before = world.record();
  EXPECT_EQ(world.Decide().SerializeAsString(), before.SerializeAsString()) << "nothing has changed";
}

// A record that somebody else wrote into etcd, or of another model.
TEST(Decide, UnitsThatTheModelLacksAreNotAssigned) {
  cluster::Members members;
  members[NodeId{1}] = Member(1, cluster::v1::ROLE_EXPERT);
  PlacementRecord record;
  auto& assignment = *record.add_assigned();
  assignment.set_node_id(1);
  for (const uint32_t layer : {1u, 99u}) {
    auto& unit = *assignment.add_units();
    unit.set_layer(layer);
    unit.set_group(0);
  }
  const PlacementRecord next = router::Decide(Options(1), members, record, 1 << 30);
  ASSERT_EQ(next.assigned_size(), 1);
  EXPECT_EQ(next.assigned(0).units_size(), static_cast<int>(kLayers * kGroups));
  for (const auto& unit : next.assigned(0).units()) EXPECT_LE(unit.layer(), kLayers);
}

TEST(Decide, ServersThatDrainKeepAUnitUntilAnotherHasLoadedIt) {
  for (const uint32_t seed : {1, 2, 3}) {
    World world(Options(3), seed);
    for (const uint64_t id : {1, 2, 3}) world.Join(id);
    world.Settle(false);
    world.Drain(2);
    world.Settle(/*whole=*/true);
    EXPECT_TRUE(world.Hosted(2).empty());
    EXPECT_TRUE(world.Assigned(2).empty());
    world.Kill(2);
    world.Settle(/*whole=*/true);
  }
}

TEST(Decide, TheLastServerKeepsWhatItHasWhileItDrains) {
  World world(Options(1));
  world.Join(1);
  world.Settle(false);
  world.Drain(1);
  world.Settle(/*whole=*/true);
  EXPECT_EQ(world.Hosted(1).size(), kLayers * kGroups);
}

TEST(Decide, ServersThatJoinGetTheirPartAndOthersLetGoOfIt) {
  World world(Options(2));
  world.Join(1);
  world.Join(2);
  world.Settle(false);
  world.Join(3);
  world.Join(4);
  world.Settle(/*whole=*/true);
  size_t all = 0;
  for (const uint64_t id : {1, 2, 3, 4}) {
    EXPECT_GE(world.Hosted(id).size(), 3u) << id;
    EXPECT_LE(world.Hosted(id).size(), 9u) << id;
    all += world.Hosted(id).size();
  }
  EXPECT_LE(all, kLayers * kGroups * 5 / 4) << "copies that nobody needs";
}

TEST(Decide, ReplicasKeepServingWhenOneServerIsGone) {
  World world(Options(3, 2));
  for (const uint64_t id : {1, 2, 3}) world.Join(id);
  world.Settle(false);
  world.Kill(1);
  world.Settle(/*whole=*/true);
  EXPECT_EQ(world.Hosted(2).size(), kLayers * kGroups);
  EXPECT_EQ(world.Hosted(3).size(), kLayers * kGroups);
}

TEST(Decide, AServerThatNoRouterReachesIsTakenForDeadUntilItIsBack) {
  World world(Options(2));
  world.Join(1);
  world.Join(2);
  world.Settle(false);
  const Units had = world.Hosted(1);
  world.Lose(1);
  world.Decide();
  for (const UnitId unit : had) EXPECT_TRUE(world.Published(unit).empty());
  world.Settle(false);
  EXPECT_EQ(world.Hosted(2).size(), kLayers * kGroups);
  world.FindAgain();
  world.Settle(/*whole=*/true);
}

TEST(Decide, ARestartedRouterGoesOnWithWhatServersReport) {
  World world(Options(2));
  world.Join(1);
  world.Join(2);
  world.Settle(false);
  const Units first = world.Hosted(1), second = world.Hosted(2);
  world.ForgetRecord();
  world.options().settled_ms = 1000;
  {
    // One of them is not back yet: nothing of its is given away before the others have settled.
    World restarted = world;
    restarted.Kill(2);
    restarted.Decide(/*now_ms=*/999);
    EXPECT_EQ(restarted.Assigned(1), first);
    restarted.Decide(/*now_ms=*/1000);
    EXPECT_EQ(restarted.Assigned(1).size(), kLayers * kGroups);
  }
  world.Decide(/*now_ms=*/999);
  EXPECT_EQ(world.Assigned(1), first);
  EXPECT_EQ(world.Assigned(2), second);
  world.CheckPublished(/*whole=*/true);
}

TEST(Decide, KeepsEveryUnitServedThroughRandomHistories) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    World world(Options(3, 2), seed);
    std::mt19937 random(seed + 100);
    std::set<uint64_t> up;
    uint64_t next = 1;
    for (int i = 0; i < 4; ++i) {
      world.Join(next);
      up.insert(next++);
    }
    world.Settle(false);
    for (int event = 0; event < 12; ++event) {
      if (random() % 2 == 0 || up.size() <= 3) {
        world.Join(next);
        up.insert(next++);
      } else {
        const auto victim = std::next(up.begin(), random() % up.size());
        if (random() % 2 == 0) {
          world.Drain(*victim);
          world.Settle(/*whole=*/true);
        }
        world.Kill(*victim);  // one at a time: the other replica lives
        up.erase(victim);
      }
      world.Settle(/*whole=*/true);
    }
  }
}

}  // namespace
}  // namespace minke::router
