#include "services/router/placement/policy.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <random>
#include <set>

#include "gtest/gtest.h"
#include "services/router/placement/moves.h"
#include "services/router/placement/step_time.h"

namespace minke::router {
namespace {

// DeepSeek-V2 on H200: 8 groups of 20 experts of 47.19 MB, 2 experts and 94.4 MFLOP per (row, group).
UnitShape V2Shape() {
  return {.unit_bytes = 20 * 47.19e6, .experts = 20, .experts_per_row = 2, .flops_per_row = 94.4e6};
}

// A cluster that carries moves out: a load takes until the next round, weights are published at once.
struct World {
  PlacementSnapshot now;
  PlacementOptions options;

  World(int layers, int servers, int replicas, int64_t slots = ServerSnapshot::kUnlimited) {
    now.shape = V2Shape();
    now.replicas = replicas;
    for (uint32_t layer = 0; layer < static_cast<uint32_t>(layers); ++layer) {
      for (uint32_t group = 0; group < 8; ++group) now.units.push_back({{layer, group}});
    }
    for (int i = 1; i <= servers; ++i) AddServer(i, slots);
  }
  ServerSnapshot& AddServer(uint64_t id, int64_t slots = ServerSnapshot::kUnlimited) {
    ServerSnapshot& server = now.servers.emplace_back();
    server.id = NodeId{id};
    server.slots = slots;
    return server;
  }
  ServerSnapshot* Find(NodeId id) {
    for (ServerSnapshot& server : now.servers) {
      if (server.id == id) return &server;
    }
    return nullptr;
  }
  void Kill(uint64_t id) {
    std::erase_if(now.servers, [&](const ServerSnapshot& server) { return server.id == NodeId{id}; });
  }
  int Loaded(UnitId unit) const {
    int count = 0;
    for (const ServerSnapshot& server : now.servers) {
      count += std::any_of(server.units.begin(), server.units.end(),
                           [&](const HostedUnit& hosted) { return hosted.unit == unit && hosted.loaded; });
    }
    return count;
  }

  // What must hold of every plan, whatever the snapshot.
  void Check(const PlacementPlan& plan) {
    std::map<NodeId, std::set<UnitId>> hosted, loading;
    for (const ServerSnapshot& server : now.servers) {
      for (const HostedUnit& unit : server.units) hosted[server.id].insert(unit.unit);
    }
    // Every unit is answered for, never twice on a server, never on a draining one.
    ASSERT_EQ(plan.desired.size(), now.units.size());
    std::map<NodeId, int64_t> wanted;
    for (const auto& [unit, servers] : plan.desired) {
      ASSERT_TRUE(std::is_sorted(servers.begin(), servers.end()));
      ASSERT_EQ(std::set<NodeId>(servers.begin(), servers.end()).size(), servers.size());
      for (const NodeId server : servers) {
        ASSERT_NE(Find(server), nullptr);
        ASSERT_FALSE(Find(server)->draining);
        ++wanted[server];
      }
    }
    // Capacity: of what is wanted, and at every moment of the moves (a drop frees its slot a round later).
    for (const auto& [server, count] : wanted)
      ASSERT_LE(count, std::max<int64_t>(Find(server)->slots, std::ssize(hosted[server])));
    for (const Move& move : plan.moves) {
      if (move.kind == Move::Kind::kLoad) {
        ASSERT_TRUE(hosted[move.server].insert(move.unit).second) << "loads what is there";
        ASSERT_LE(std::ssize(hosted[move.server]), Find(move.server)->slots);
      }
    }
    // No unit loses its last loaded replica, or falls under the asked number by a drop.
    std::map<UnitId, int> left;
    for (const UnitLoad& load : now.units) left[load.unit] = Loaded(load.unit);
    for (const Move& move : plan.moves) {
      if (move.kind != Move::Kind::kDrop) continue;
      const auto& units = Find(move.server)->units;
      const auto hosted = std::find_if(units.begin(), units.end(),
                                       [&](const HostedUnit& unit) { return unit.unit == move.unit; });
      ASSERT_NE(hosted, units.end());
      left[move.unit] -= hosted->loaded;
      ASSERT_GE(left[move.unit],
                std::min<int>(now.replicas, std::max<int>(1, std::ssize(plan.desired.at(move.unit)))));
    }
    // Weights of a unit with a loaded replica add up to 1, over loaded replicas that are not dropped.
    for (const auto& [unit, replicas] : plan.weights) {
      double sum = 0;
      for (const Replica& replica : replicas) {
        ASSERT_GE(replica.weight, 0);
        sum += replica.weight;
        ASSERT_EQ(
            std::count(plan.moves.begin(), plan.moves.end(), Move{Move::Kind::kDrop, unit, replica.server}),
            0);
      }
      if (replicas.empty()) {
        ASSERT_EQ(Loaded(unit), 0);
      } else {
        ASSERT_NEAR(sum, 1, 1e-6);
      }
    }
  }

  // One round; returns the number of moves.
  int Round() {
    const PlacementPlan plan = PlanPlacement(now, options);
    Check(plan);
    if (::testing::Test::HasFatalFailure()) return 0;
    for (ServerSnapshot& server : now.servers) {
      for (HostedUnit& hosted : server.units) hosted.loaded = true, hosted.weight = 0;
    }
    for (const Move& move : plan.moves) {
      std::vector<HostedUnit>& units = Find(move.server)->units;
      if (move.kind == Move::Kind::kLoad) {
        units.push_back({move.unit, /*loaded=*/false});
      } else {
        std::erase_if(units, [&](const HostedUnit& hosted) { return hosted.unit == move.unit; });
      }
    }
    for (const auto& [unit, replicas] : plan.weights) {
      for (const Replica& replica : replicas) {
        for (HostedUnit& hosted : Find(replica.server)->units) {
          if (hosted.unit == unit) hosted.weight = replica.weight;
        }
      }
    }
    return static_cast<int>(plan.moves.size());
  }
  // Rounds until nothing is left to do; the moves made, -1 if that takes more than `rounds`.
  int Settle(int rounds = 400) {
    for (int total = 0; rounds > 0; --rounds) {
      const PlacementPlan next = PlanPlacement(now, options);
      if (next.moves.empty() && next.loads_missing == 0) return total;
      total += Round();
      if (::testing::Test::HasFatalFailure()) return -1;
    }
    return -1;
  }
  StepTime Time() {
    const PlacementPlan plan = PlanPlacement(now, options);
    return PredictStep(now, plan.weights);
  }
  // Zipf over groups in another order in each layer; no group takes more than a third of the pairs.
  void SetZipf(double exponent, double pairs, uint64_t seed, double noise = 0) {
    std::mt19937_64 order(seed), dice(seed * 77 + now.servers.size() + pairs_drawn_++);
    std::normal_distribution<double> normal;
    for (size_t begin = 0; begin < now.units.size(); begin += 8) {
      std::vector<double> share(8);
      for (int g = 0; g < 8; ++g) share[g] = std::pow(g + 1, -exponent);
      std::shuffle(share.begin(), share.end(), order);
      double sum = 0, rest = 1;
      for (double& s : share) sum += s *= std::exp(noise * normal(dice));
      const double top = *std::max_element(share.begin(), share.end()) / sum;
      if (top > 1.0 / 3) rest = (2.0 / 3) / (1 - top);
      for (int g = 0; g < 8; ++g) {
        const double s = share[g] / sum;
        now.units[begin + g].rows = pairs * (top > 1.0 / 3 ? (s == top ? 1.0 / 3 : s * rest) : s);
      }
    }
  }

 private:
  uint64_t pairs_drawn_ = 0;
};

// What every server is to host; one without units too.
std::map<NodeId, std::vector<UnitId>> DesiredByServer(const PlacementSnapshot& snapshot) {
  std::map<NodeId, std::vector<UnitId>> units;
  for (const ServerSnapshot& server : snapshot.servers) units[server.id];
  for (const auto& [unit, servers] : PlanPlacement(snapshot, {}).desired) {
    for (const NodeId server : servers) units.at(server).push_back(unit);
  }
  return units;
}

TEST(PlanPlacement, NoServerHostsNothing) {
  World world(1, 0, 1);
  const PlacementPlan plan = PlanPlacement(world.now, {});
  EXPECT_EQ(plan.desired.size(), 8u);
  EXPECT_TRUE(plan.moves.empty());
  EXPECT_TRUE(DesiredByServer(world.now).empty());
}

// First placement: every unit has its replicas on different servers, and equal servers host equally many,
// in every layer and in all.
TEST(PlanPlacement, FirstPlacementIsEven) {
  for (const int n : {1, 2, 3, 4, 8, 16, 64, 320}) {
    for (const int replicas : {1, 2, 3}) {
      World world(5, n, replicas);
      const auto assignment = DesiredByServer(world.now);
      ASSERT_EQ(std::ssize(assignment), n);
      std::map<UnitId, int> copies;
      size_t least = SIZE_MAX, most = 0;
      for (const auto& [server, list] : assignment) {
        least = std::min(least, list.size());
        most = std::max(most, list.size());
        for (const UnitId unit : list) ++copies[unit];
      }
      EXPECT_EQ(copies.size(), world.now.units.size());
      for (const auto& [unit, count] : copies) EXPECT_EQ(count, std::min(n, replicas));
      EXPECT_LE(most - least, 1u) << n << " servers, " << replicas << " replicas";
    }
  }
}

TEST(PlanPlacement, FirstLoadsAreNotHeldBack) {
  World world(59, 8, 1);
  const PlacementPlan plan = PlanPlacement(world.now, {});
  EXPECT_EQ(plan.moves.size(), world.now.units.size());
}

// A lost server's units go elsewhere; nobody else's move.
TEST(PlanPlacement, LostServerMovesOnlyItsOwnUnits) {
  World world(7, 4, 1);
  ASSERT_GE(world.Settle(), 0);
  const auto before = DesiredByServer(world.now);
  world.Kill(3);
  world.AddServer(9);
  const auto after = DesiredByServer(world.now);
  for (const uint64_t kept : {1, 2, 4}) EXPECT_EQ(after.at(NodeId{kept}), before.at(NodeId{kept}));
  EXPECT_EQ(after.at(NodeId{9}), before.at(NodeId{3}));
}

TEST(PlanPlacement, ANewServerTakesNothingWithoutNeed) {
  World world(7, 4, 2);
  ASSERT_GE(world.Settle(), 0);
  world.AddServer(5);
  EXPECT_EQ(world.Settle(), 0);
}

TEST(PlanPlacement, FasterServersGetMoreUnits) {
  World world(10, 3, 1);
  world.now.servers[0].speed = 2;
  const auto assignment = DesiredByServer(world.now);
  EXPECT_EQ(assignment.at(NodeId{1}).size(), 40u);
  EXPECT_EQ(assignment.at(NodeId{2}).size(), 20u);
}

TEST(PlanPlacement, ASmallServerSpreadsItsRoomOverTheLayers) {
  World world(12, 3, 1);
  world.now.servers[1].slots = 12;
  const auto assignment = DesiredByServer(world.now);
  std::set<uint32_t> layers;
  for (const UnitId unit : assignment.at(NodeId{2})) layers.insert(unit.layer);
  EXPECT_EQ(layers.size(), 12u);
}

TEST(PlanPlacement, ReplicasLieOnDifferentHosts) {
  World world(6, 8, 2);
  for (size_t i = 0; i < 8; ++i) world.now.servers[i].host = i < 4 ? "a" : "b";
  for (const auto& [unit, servers] : PlanPlacement(world.now, {}).desired) {
    ASSERT_EQ(servers.size(), 2u);
    EXPECT_NE(world.Find(servers[0])->host, world.Find(servers[1])->host);
  }
}

TEST(PlanPlacement, ASecondHostGetsAReplicaOfEverything) {
  World world(3, 4, 2);
  for (ServerSnapshot& server : world.now.servers) server.host = "a";
  ASSERT_GE(world.Settle(), 0);
  world.AddServer(5).host = "b";
  ASSERT_GE(world.Settle(), 0);
  EXPECT_EQ(world.Find(NodeId{5})->units.size(), 24u);
}

// Where only servers that have a unit already have room, others make room for it.
TEST(PlanPlacement, TightPoolsHoldAllThatFits) {
  std::mt19937_64 random(5);
  int feasible = 0;
  for (int run = 0; run < 400; ++run) {
    const int servers = 2 + random() % 7, replicas = std::min<int>(servers, 1 + random() % 3);
    World world(1 + random() % 4, servers, replicas);
    const int64_t units = std::ssize(world.now.units);
    int64_t room = 0;
    for (ServerSnapshot& server : world.now.servers) {
      server.slots = random() % (2 * units * replicas / servers + 2);
      room += std::min(server.slots, units);
    }
    if (room < units * replicas) continue;
    ++feasible;
    for (const auto& [unit, hosts] : PlanPlacement(world.now, {}).desired)
      EXPECT_EQ(std::ssize(hosts), replicas);
    world.Check(PlanPlacement(world.now, {}));
    ASSERT_FALSE(HasFatalFailure());
  }
  EXPECT_GT(feasible, 50);
}

// With less room than asked for, every unit comes before any second replica.
TEST(PlanPlacement, OneOfEachBeforeASecond) {
  World world(4, 4, 2, /*slots=*/10);
  const PlacementPlan plan = PlanPlacement(world.now, {});
  size_t total = 0;
  for (const auto& [unit, servers] : plan.desired) {
    EXPECT_GE(servers.size(), 1u);
    total += servers.size();
  }
  EXPECT_EQ(total, 40u);
}

// A draining server's units are loaded elsewhere before they are dropped; it ends empty.
TEST(PlanPlacement, DrainingServerEndsEmpty) {
  for (const int replicas : {1, 2}) {
    World world(20, 4, replicas);
    world.SetZipf(1.2, 3 * 4096, 5);
    ASSERT_GE(world.Settle(), 0);
    world.now.servers[2].draining = true;
    ASSERT_GE(world.Settle(), 0);
    EXPECT_TRUE(world.now.servers[2].units.empty());
    for (const UnitLoad& load : world.now.units) EXPECT_GE(world.Loaded(load.unit), replicas);
  }
}

TEST(PlanPlacement, TheOnlyServerKeepsItsUnitsWhileDraining) {
  World world(3, 1, 1);
  ASSERT_GE(world.Settle(), 0);
  world.now.servers[0].draining = true;
  world.Round();
  world.Round();
  EXPECT_EQ(world.now.servers[0].units.size(), 24u);
}

TEST(PlanPlacement, ADeadServersUnitsComeBack) {
  World world(59, 8, 1);
  world.SetZipf(1.2, 3 * 4096, 5);
  ASSERT_GE(world.Settle(), 0);
  world.Kill(3);
  ASSERT_GE(world.Settle(), 0);
  for (const UnitLoad& load : world.now.units) EXPECT_GE(world.Loaded(load.unit), 1);
}

TEST(PlanPlacement, LoadsAreBoundedPerRound) {
  World world(59, 8, 1, 2 * 59);
  ASSERT_GE(world.Settle(), 0);
  world.SetZipf(1.2, 3 * 32768, 5);
  const PlacementPlan plan = PlanPlacement(world.now, world.options);
  std::map<NodeId, int> loads;
  for (const Move& move : plan.moves) ++loads[move.server];
  for (const auto& [server, count] : loads) EXPECT_LE(count, world.options.loads_per_server_max);
  EXPECT_EQ(std::ssize(plan.moves), world.options.loads_max);
  EXPECT_GT(plan.loads_missing, std::ssize(plan.moves));
}

TEST(PlanPlacement, AnUnpayableLoadIsNotMade) {
  World world(4, 8, 1, 8);
  world.options.load_bytes_per_s = 1e6;  // 944 s for a unit
  ASSERT_GE(world.Settle(), 0);
  world.SetZipf(1.2, 3 * 32768, 5);
  EXPECT_EQ(world.Settle(), 0);
}

TEST(PlanPlacement, FewRowsAreNotSplit) {
  World world(4, 8, 2, 8);
  world.SetZipf(1.2, 3 * 128, 5);  // at most 13 rows per expert
  ASSERT_GE(world.Settle(), 0);
  for (const auto& [unit, replicas] : PlanPlacement(world.now, world.options).weights) {
    EXPECT_EQ(std::count_if(replicas.begin(), replicas.end(), [](const Replica& r) { return r.weight > 0; }),
              1);
  }
}

// The target: 8 groups on 8 servers, 16 slots per layer, Zipf 1.2 over groups.
TEST(PlanPlacement, BalancesZipfLoadsOn8Servers) {
  for (const uint64_t seed : {1, 2, 3}) {
    World world(59, 8, 1, 2 * 59);
    ASSERT_GE(world.Settle(), 0);
    world.SetZipf(1.2, 3 * 32768, seed);
    const double before = world.Time().balance();
    ASSERT_GE(world.Settle(), 0);
    EXPECT_LT(before, 0.6);
    EXPECT_GE(world.Time().balance(), 0.95);
  }
}

// The policy optimises time, not balance: more balance by reading weights twice is no gain.
TEST(PlanPlacement, StepTimeNeverGrowsByRebalancing) {
  for (const double rows : {64, 512, 4096, 32768}) {
    for (const int servers : {2, 4, 8, 16, 64}) {
      World world(6, servers, 1, 2 * 48 / servers + 2);
      ASSERT_GE(world.Settle(), 0);
      world.SetZipf(1.2, 3 * rows, 9);
      const double before = world.Time().max_s;
      ASSERT_GE(world.Settle(), 0);
      EXPECT_LE(world.Time().max_s, before * 1.0001) << rows << " rows, " << servers << " servers";
    }
  }
}

// Servers of which each has a slot or two more than its part, for moving: units change places, nobody keeps
// more than its part for it, and the step gets about as fast as with twice the room.
TEST(PlanPlacement, FullServersExchangeUnits) {
  int faster = 0, over = 0;
  for (const int servers : {2, 4, 8}) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      const int64_t part = 6 * 8 / servers;
      World world(6, servers, 1, part + (part + 15) / 16), wide(6, servers, 1, 2 * part);
      for (ServerSnapshot& server : world.now.servers) server.room = part;
      ASSERT_GE(world.Settle(), 0);
      ASSERT_GE(wide.Settle(), 0);
      world.SetZipf(1.2, 3 * 8, seed);
      wide.SetZipf(1.2, 3 * 8, seed);
      const double before = world.Time().max_s;
      ASSERT_GE(world.Settle(), 0) << servers << " servers, seed " << seed;
      ASSERT_GE(wide.Settle(), 0);
      for (const ServerSnapshot& server : world.now.servers) over += std::ssize(server.units) > part;
      EXPECT_LE(world.Time().max_s, before);
      faster += world.Time().max_s < 0.95 * before;
      EXPECT_LE(world.Time().max_s, 1.05 * wide.Time().max_s)
          << servers << " servers, seed " << seed << ", before " << before;
    }
  }
  EXPECT_GE(faster, 5);
  EXPECT_LE(over, 15);  // of 70
}

// Hysteresis: noise around a load that does not change moves (almost) nothing once settled.
TEST(PlanPlacement, NoiseMovesNothing) {
  for (const int servers : {4, 8, 16}) {
    World world(12, servers, 1, 2 * 96 / servers);
    world.SetZipf(1.2, 3 * 32768, 3);
    ASSERT_GE(world.Settle(), 0);
    std::vector<UnitLoad> mean;
    int moves = 0;
    for (int round = 0; round < 100; ++round) {
      world.SetZipf(1.2, 3 * 32768, 3, /*noise=*/0.1);
      SmoothLoads(mean, world.now.units, 0.2);
      world.now.units = mean;
      moves += world.Round();
      if (HasFatalFailure()) return;
    }
    EXPECT_LE(moves, 12) << servers << " servers";  // one per layer, in 100 rounds
  }
}

// Full servers under loads that change: replicas make room for others, again and again.
TEST(PlanPlacement, ChangingLoadsKeepTheInvariants) {
  for (const int replicas : {1, 2}) {
    World world(12, 8, replicas, 24 + 6);
    ASSERT_GE(world.Settle(), 0);
    for (uint64_t seed = 1; seed < 40; ++seed) {
      world.SetZipf(1.2, 3 * 32768, seed);
      for (int round = 0; round < 6; ++round) world.Round();
      ASSERT_FALSE(HasFatalFailure());
      for (const UnitLoad& load : world.now.units) ASSERT_GE(world.Loaded(load.unit), replicas);
    }
  }
}

// Random pools, loads, capacities, speeds, hosts, drains and deaths: the invariants of Check() hold in every
// round, every unit that was loaded stays loaded unless its servers died, and it settles.
TEST(PlanPlacement, RandomPoolsKeepTheInvariants) {
  std::mt19937_64 random(11);
  for (int run = 0; run < 60; ++run) {
    const int servers = std::array{1, 2, 4, 8, 16, 64}[run % 6], layers = 1 + random() % 6;
    const int replicas = 1 + random() % 3;
    World world(layers, servers, replicas);
    const int64_t even = layers * 8 * replicas / servers + 1;
    for (ServerSnapshot& server : world.now.servers) {
      if (random() % 2 == 0) server.slots = even + random() % (even + 1);
      server.speed = std::array{0.5, 1.0, 1.0, 2.0}[random() % 4];
      if (random() % 3 == 0) server.host = random() % 2 == 0 ? "a" : "b";
    }
    uint64_t next_id = 1000;
    for (int event = 0; event < 6; ++event) {
      SCOPED_TRACE(testing::Message() << "run " << run << " event " << event);
      world.SetZipf(0.5 + random() % 3 * 0.5, std::pow(10.0, 2 + random() % 4), random());
      ASSERT_GE(world.Settle(), 0);
      std::map<UnitId, int> loaded;
      for (const UnitLoad& load : world.now.units) loaded[load.unit] = world.Loaded(load.unit);
      switch (random() % 4) {
        case 0:
          world.AddServer(next_id++, even + random() % 10);
          break;
        case 1:
          world.now.servers[random() % world.now.servers.size()].draining = true;
          break;
        case 2:
          if (world.now.servers.size() > 1)
            world.Kill(world.now.servers[random() % world.now.servers.size()].id.value);
          break;
        case 3:
          break;
      }
      for (int round = 0; round < 3; ++round) {
        world.Round();
        ASSERT_FALSE(HasFatalFailure());
      }
    }
  }
}

TEST(PlanPlacement, IsDeterministic) {
  World world(10, 8, 2, 30);
  world.SetZipf(1.2, 3 * 8192, 4);
  const PlacementPlan a = PlanPlacement(world.now, {}), b = PlanPlacement(world.now, {});
  EXPECT_EQ(a.desired, b.desired);
  EXPECT_EQ(a.moves, b.moves);
}

// Not an assertion on speed, only that nothing is quadratic in the cluster: seconds would be seen.
TEST(PlanPlacement, AFullPlanIsQuick) {
  for (const int servers : {8, 64, 320}) {
    World world(59, servers, 1, 2 * 472 / servers + 1);
    world.SetZipf(1.2, 3 * 32768, 4);
    world.Round();  // first placement, nothing loaded yet
    const auto begin = std::chrono::steady_clock::now();
    PlanPlacement(world.now, {});
    const auto us =
        std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin);
    RecordProperty("servers_" + std::to_string(servers) + "_us", static_cast<int>(us.count()));
    EXPECT_LT(us.count(), 2000000) << servers;
  }
}

}  // namespace
}  // namespace minke::router
