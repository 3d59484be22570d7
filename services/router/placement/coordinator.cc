#include "services/router/placement/coordinator.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "google/protobuf/util/message_differencer.h"
#include "libs/base/strings.h"
#include "services/router/placement/moves.h"
#include "services/router/placement/policy.h"

namespace minke::router {
namespace {

using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

UnitId UnitOf(const cluster::v1::Unit& unit) { return {unit.layer(), unit.group()}; }

void SetUnit(UnitId unit, cluster::v1::Unit& out) {
  out.set_layer(unit.layer);
  out.set_group(unit.group);
}

// Expert servers that half of the routers or more cannot reach: a router that has died meanwhile says nothing
// new until its lease ends. One that has no router to say so counts as reachable.
std::set<NodeId> Unreachable(const cluster::Members& members) {
  std::map<NodeId, int> lost;
  int routers = 0;
  for (const auto& [id, report] : members) {
    if (report.member().role() != cluster::v1::ROLE_ROUTER) continue;
    ++routers;
    for (const uint64_t server : report.lost()) ++lost[NodeId{server}];
  }
  std::set<NodeId> unreachable;
  for (const auto& [server, count] : lost) {
    if (2 * count >= routers) unreachable.insert(server);
  }
  return unreachable;
}

// Rows of a step from which an expert's rows, without loads, are guessed: any number does, as long as it is
// the same for all, so that servers that join an idle cluster get their part.
constexpr double kRowsUnobserved = 1;
// Fewer exchanges are no load to place by.
constexpr double kExchangesMin = 1;
// Servers that do not say how much room they have may be given one more unit for every so many: nothing could
// move to a full server.
constexpr int64_t kUnitsPerMovingSlot = 16;
// Weights that differ by less are the same.
constexpr double kWeightNoise = 1e-3;

// The expert servers that answer, as the policy wants them.
struct Pool {
  PlacementSnapshot snapshot;
  std::map<NodeId, std::set<UnitId>> loaded;
  int joined = 0;       // those that stay
  bool placed = false;  // something is hosted or assigned

  Pool(const CoordinatorOptions& options, const cluster::Members& members, const PlacementRecord& current) {
    snapshot.shape = options.shape;
    snapshot.replicas = options.replicas;
    AddLoads(options, members);
    const std::set<NodeId> unreachable = Unreachable(members);
    const std::set<UnitId> known(options.units.begin(), options.units.end());
    std::map<NodeId, std::set<UnitId>> assigned;
    for (const auto& assignment : current.assigned()) {
      for (const auto& unit : assignment.units()) {
        if (known.contains(UnitOf(unit))) assigned[NodeId{assignment.node_id()}].insert(UnitOf(unit));
      }
    }
    std::map<std::pair<NodeId, UnitId>, double> weights;
    for (const auto& unit : current.placement()) {
      for (int i = 0; i < unit.weights_size(); ++i)
        weights[{NodeId{unit.node_ids(i)}, UnitOf(unit.unit())}] = unit.weights(i);
    }
    for (const auto& [id, report] : members) {
      if (report.member().role() != cluster::v1::ROLE_EXPERT || unreachable.contains(id)) continue;
      std::set<UnitId>& hosts = loaded[id];
      for (const auto& unit : report.hosted()) {
        if (known.contains(UnitOf(unit))) hosts.insert(UnitOf(unit));
      }
      ServerSnapshot& server = snapshot.servers.emplace_back();
      server.id = id;
      server.host = report.member().host();
      server.draining = report.member().draining();
      if (report.bytes_per_s() > 0) server.bytes_per_s = report.bytes_per_s();
      if (report.flops_per_s() > 0) server.flops_per_s = report.flops_per_s();
      if (report.unit_slots() > 0) server.slots = report.unit_slots();
      // What it was assigned and is still loading, and what it has: also what it came with, after an outage
      // or with a new registry.
      std::set<UnitId> all = hosts;
      if (const auto it = assigned.find(id); it != assigned.end())
        all.insert(it->second.begin(), it->second.end());
      for (const UnitId unit : all) {
        const auto weight = weights.find({id, unit});
        server.units.push_back({unit, hosts.contains(unit), weight == weights.end() ? 0 : weight->second});
      }
      placed |= !all.empty();
      joined += server.draining ? 0 : 1;
    }
    const int64_t copies = std::ssize(options.units) * std::min(options.replicas, std::max(joined, 1));
    const int64_t part = (copies + std::max(joined, 1) - 1) / std::max(joined, 1);
    for (ServerSnapshot& server : snapshot.servers) {
      const bool stated = server.slots != ServerSnapshot::kUnlimited;
      server.room = stated ? server.slots : part + options.spare_slots;
      if (!stated) server.slots = server.room + (part + kUnitsPerMovingSlot - 1) / kUnitsPerMovingSlot;
    }
  }

  void AddLoads(const CoordinatorOptions& options, const cluster::Members& members) {
    std::map<UnitId, double> rows;
    double exchanges = 0;
    for (const auto& [id, report] : members) {
      for (const auto& load : report.loads()) rows[UnitOf(load.unit())] += load.rows_per_s();
      exchanges += report.exchanges_per_s();
    }
    for (const UnitId unit : options.units) {
      const auto it = rows.find(unit);
      const double seen = it == rows.end() ? 0 : it->second;
      snapshot.units.push_back({unit, exchanges >= kExchangesMin ? seen / exchanges : kRowsUnobserved});
    }
  }
};

// The unit's loaded replicas and their weights; what is published already where it says the same.
void Publish(const std::vector<Replica>& replicas, const cluster::v1::UnitReplicas* current,
             cluster::v1::UnitReplicas& out) {
  bool same = current != nullptr && current->node_ids_size() == static_cast<int>(replicas.size()) &&
              current->weights_size() == current->node_ids_size();
  for (size_t i = 0; same && i < replicas.size(); ++i) {
    same = current->node_ids(static_cast<int>(i)) == replicas[i].server.value &&
           std::abs(current->weights(static_cast<int>(i)) - replicas[i].weight) < kWeightNoise;
  }
  if (same) {
    out = *current;
    return;
  }
  for (const Replica& replica : replicas) {
    out.add_node_ids(replica.server.value);
    out.add_weights(static_cast<float>(replica.weight));
  }
}

}  // namespace

PlacementRecord Decide(const CoordinatorOptions& options, const cluster::Members& members,
                       const PlacementRecord& current, int64_t now_ms) {
  const Pool pool(options, members, current);
  PlacementRecord next;
  *next.mutable_epoch() = current.epoch();
  PlacementPlan plan;
  const bool waits = !pool.placed && pool.joined < options.expert_servers;
  // The others will be back in a moment, with what they have.
  const bool settles = pool.joined < options.expert_servers && now_ms < options.settled_ms;
  if (waits) {
    next.set_waiting_for(StrCat("expert servers: ", pool.joined, " of ", options.expert_servers, " joined"));
  } else if (!settles && !pool.snapshot.servers.empty()) {
    plan = PlanPlacement(pool.snapshot, {});
  }
  std::set<std::pair<UnitId, NodeId>> dropped;
  for (const Move& move : plan.moves) {
    if (move.kind == Move::Kind::kDrop) dropped.emplace(move.unit, move.server);
  }
  std::map<UnitId, const cluster::v1::UnitReplicas*> published;
  for (const auto& unit : current.placement()) published[UnitOf(unit.unit())] = &unit;
  for (const UnitId unit : options.units) {
    std::map<NodeId, double> weights;
    if (const auto it = plan.weights.find(unit); it != plan.weights.end()) {
      for (const Replica& replica : it->second) weights[replica.server] = replica.weight;
    }
    std::vector<Replica> replicas;  // by id, so they ascend
    for (const auto& [server, hosts] : pool.loaded) {
      if (!hosts.contains(unit) || dropped.contains({unit, server})) continue;
      const auto weight = weights.find(server);
      replicas.push_back({server, weight == weights.end() ? 0 : weight->second});
    }
    cluster::v1::UnitReplicas& out = *next.add_placement();
    const auto before = published.find(unit);
    Publish(replicas, before == published.end() ? nullptr : before->second, out);
    SetUnit(unit, *out.mutable_unit());
  }
  if (!waits) {
    for (const auto& [server, units] : AssignmentAfter(pool.snapshot, plan.moves)) {
      if (units.empty()) continue;
      cluster::v1::Assignment* out = next.add_assigned();
      out->set_node_id(server.value);
      for (const UnitId unit : units) SetUnit(unit, *out->add_units());
    }
  }

  const bool same = std::equal(next.placement().begin(), next.placement().end(), current.placement().begin(),
                               current.placement().end(), [](const auto& a, const auto& b) {
                                 return google::protobuf::util::MessageDifferencer::Equals(a, b);
                               });
  if (next.epoch().term() == 0) next.mutable_epoch()->set_term(options.fresh_term);
  if (!same || current.epoch().counter() == 0)
    next.mutable_epoch()->set_counter(current.epoch().counter() + 1);
  return next;
}

}  // namespace minke::router
