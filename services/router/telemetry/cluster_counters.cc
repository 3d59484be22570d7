#include "services/router/telemetry/cluster_counters.h"

#include <map>
#include <string>

namespace minke::router {
namespace {

using cluster::v1::Member;
using cluster::v1::Role;

constexpr std::pair<Role, const char*> kRoles[] = {{cluster::v1::ROLE_GATEWAY, "gateway"},
                                                   {cluster::v1::ROLE_ROUTER, "router"},
                                                   {cluster::v1::ROLE_ATTENTION, "attention"},
                                                   {cluster::v1::ROLE_EXPERT, "expert"}};

const char* NameOf(Role role) {
  for (const auto& [candidate, name] : kRoles) {
    if (candidate == role) return name;
  }
  return "unknown";
}

const char* StateOf(const Member& member) {
  return member.draining() ? "draining" : member.ready() ? "ready" : "starting";
}

}  // namespace

void ClusterCounters::OnView(const cluster::v1::ClusterView& view) {
  std::set<std::pair<UnitId, NodeId>> replicas;
  for (const cluster::v1::UnitReplicas& unit : view.placement()) {
    for (const uint64_t node : unit.node_ids())
      replicas.insert({UnitId{unit.unit().layer(), unit.unit().group()}, NodeId{node}});
  }
  const MutexLock lock(mutex_);
  for (const auto& replica : replicas) added_ += replicas_.contains(replica) ? 0 : 1;
  for (const auto& replica : replicas_) dropped_ += replicas.contains(replica) ? 0 : 1;
  replicas_ = std::move(replicas);
  view_ = view;
}

void ClusterCounters::Collect(telemetry::Page& page) const {
  const MutexLock lock(mutex_);
  page.Gauge("minke:placement_term", "Term of the placement: raised when the table is made anew",
             view_.epoch().term());
  page.Gauge("minke:placement_epoch", "Epoch of the placement inside its term: raised at every change",
             view_.epoch().counter());
  page.Gauge("minke:cluster_ready",
             "Whether every unit is hosted and a router and an attention node are ready",
             view_.ready() ? 1 : 0);
  constexpr char kMoves[] = "minke:replica_moves_total", kMovesHelp[] = "Replicas published and withdrawn";
  page.Counter(kMoves, kMovesHelp, static_cast<double>(added_), {{"kind", "add"}});
  page.Counter(kMoves, kMovesHelp, static_cast<double>(dropped_), {{"kind", "drop"}});
  page.Declare("minke:replicas", "Expert servers that host the unit", telemetry::MetricType::kGauge);
  for (const cluster::v1::UnitReplicas& unit : view_.placement()) {
    page.Gauge(
        "minke:replicas", "Expert servers that host the unit", unit.node_ids_size(),
        {{"layer", std::to_string(unit.unit().layer())}, {"group", std::to_string(unit.unit().group())}});
  }
  std::map<std::pair<Role, std::string>, int> members;
  for (const Member& member : view_.members()) {
    ++members[{member.role(), StateOf(member)}];
    page.Gauge("minke:member_info", "Which process a node id names; the value is 1", 1,
               {{"server", ToString(NodeId{member.node_id()})},
                {"role", NameOf(member.role())},
                {"address", member.rpc_address()},
                {"host", member.host()}});
  }
  for (const auto& [role, name] : kRoles) {
    for (const char* state : {"starting", "ready", "draining"})
      page.Gauge("minke:members", "Members of the cluster", members[{role, state}],
                 {{"role", name}, {"state", state}});
  }
}

}  // namespace minke::router
