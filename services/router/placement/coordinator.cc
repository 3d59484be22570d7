#include "services/router/placement/coordinator.h"

#include <algorithm>

#include "google/protobuf/util/message_differencer.h"
#include "libs/base/strings.h"
#include "services/router/placement/placement_table.h"

namespace minke::router {
namespace {

using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

UnitId UnitOf(const cluster::v1::Unit& unit) { return {unit.layer(), unit.group()}; }

void SetUnit(UnitId unit, cluster::v1::Unit& out) {
  out.set_layer(unit.layer);
  out.set_group(unit.group);
}

// Expert servers that no router can reach. One that has no router to say so counts as reachable.
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
    if (count == routers) unreachable.insert(server);
  }
  return unreachable;
}

// What the expert servers have and are to have.
struct Pool {
  std::vector<NodeId> targets;                      // may be given units, ascending
  std::map<NodeId, std::set<UnitId>> loaded;        // of all that answer, leaving ones too
  std::map<NodeId, std::vector<UnitId>> previous;   // of targets: what they were assigned, or came with
  std::map<NodeId, std::vector<UnitId>> leaving;    // of draining ones: what they were assigned
  int joined = 0;
  bool placed = false;                              // something is hosted or assigned

  Pool(const cluster::Members& members, const PlacementRecord& current) {
    const std::set<NodeId> unreachable = Unreachable(members);
    std::map<NodeId, std::vector<UnitId>> assigned;
    for (const auto& assignment : current.assigned()) {
      std::vector<UnitId>& units = assigned[NodeId{assignment.node_id()}];
      for (const auto& unit : assignment.units()) units.push_back(UnitOf(unit));
    }
    for (const auto& [id, report] : members) {
      if (report.member().role() != cluster::v1::ROLE_EXPERT || unreachable.contains(id)) continue;
      std::set<UnitId>& hosts = loaded[id];
      for (const auto& unit : report.hosted()) hosts.insert(UnitOf(unit));
      const auto known = assigned.find(id);
      std::vector<UnitId> before = known != assigned.end() ? known->second : std::vector<UnitId>();
      // It joined a new record with what it had, or came back after others had taken over.
      for (const UnitId unit : hosts) {
        if (std::find(before.begin(), before.end(), unit) == before.end()) before.push_back(unit);
      }
      placed |= !before.empty();
      if (report.member().draining()) {
        leaving[id] = std::move(before);
      } else {
        targets.push_back(id);
        previous[id] = std::move(before);
        ++joined;
      }
    }
  }
};

}  // namespace

PlacementRecord Decide(const CoordinatorOptions& options, const cluster::Members& members,
                       const PlacementRecord& current, int64_t now_ms) {
  const Pool pool(members, current);
  PlacementRecord next;
  *next.mutable_epoch() = current.epoch();
  std::map<NodeId, std::vector<UnitId>> wanted;
  if (!pool.placed && pool.joined < options.expert_servers) {
    next.set_waiting_for(StrCat("expert servers: ", pool.joined, " of ", options.expert_servers, " joined"));
  } else if (pool.joined < options.expert_servers && now_ms < options.settled_ms) {
    wanted = pool.previous;  // the others will be back in a moment, with what they have
  } else {
    wanted = PlanAssignment(options.units, pool.targets, options.replicas, pool.previous);
  }

  std::map<UnitId, std::vector<NodeId>> holders;  // that are to have the unit
  for (const auto& [server, units] : wanted) {
    for (const UnitId unit : units) holders[unit].push_back(server);
  }
  const auto loaded = [&](NodeId server, UnitId unit) {
    const auto it = pool.loaded.find(server);
    return it != pool.loaded.end() && it->second.contains(unit);
  };
  // Whoever is to have a unit and has it is published. Others that have it are too, until all who are to have it
  // do: so a unit that moves is never without a server, and the old one lets go after the new one is published.
  std::map<NodeId, std::vector<UnitId>> kept;
  for (const UnitId unit : options.units) {
    const std::vector<NodeId>& to_have = holders[unit];
    const bool arrived = !to_have.empty() && std::all_of(to_have.begin(), to_have.end(), [&](NodeId server) {
      return loaded(server, unit);
    });
    cluster::v1::UnitReplicas* out = next.add_placement();
    SetUnit(unit, *out->mutable_unit());
    for (const auto& [server, hosts] : pool.loaded) {  // by id, so replicas ascend
      if (!hosts.contains(unit)) continue;
      const bool stays = std::find(to_have.begin(), to_have.end(), server) != to_have.end();
      if (!stays && arrived) continue;
      out->add_node_ids(server.value);
      if (!stays) kept[server].push_back(unit);
    }
  }
  for (const auto& [server, units] : kept) {
    std::vector<UnitId>& all = wanted[server];
    all.insert(all.end(), units.begin(), units.end());
  }
  for (auto& [server, units] : wanted) {
    if (units.empty()) continue;
    std::sort(units.begin(), units.end());
    cluster::v1::Assignment* out = next.add_assigned();
    out->set_node_id(server.value);
    for (const UnitId unit : units) SetUnit(unit, *out->add_units());
  }

  const bool same = std::equal(
      next.placement().begin(), next.placement().end(), current.placement().begin(), current.placement().end(),
      [](const auto& a, const auto& b) { return google::protobuf::util::MessageDifferencer::Equals(a, b); });
  if (next.epoch().term() == 0) next.mutable_epoch()->set_term(options.fresh_term);
  if (!same || current.epoch().counter() == 0) next.mutable_epoch()->set_counter(current.epoch().counter() + 1);
  return next;
}

}  // namespace minke::router
