#include "libs/cluster/make_view.h"

#include <string>

#include "libs/base/strings.h"

namespace minke::cluster {
namespace {

std::string NotReadyReason(const Members& members, const v1::PlacementRecord& record, int64_t units,
                           int64_t missing) {
  bool router = false, attention = false;
  std::string details;
  for (const auto& [id, report] : members) {
    const v1::Member& member = report.member();
    router |= member.role() == v1::ROLE_ROUTER && member.ready();
    attention |= member.role() == v1::ROLE_ATTENTION && member.ready() && !member.draining();
    if (!member.ready() && !member.detail().empty()) {
      StrAppend(&details, details.empty() ? "" : "; ", v1::Role_Name(member.role()), ": ", member.detail());
    }
  }
  if (!record.waiting_for().empty()) return StrCat("waiting for ", record.waiting_for());
  if (record.epoch().counter() == 0) return "waiting for a router to place the experts";
  if (missing > 0) {
    return StrCat("loading experts: ", units - missing, " of ", units, " (layer, group) units hosted");
  }
  if (!attention) return details.empty() ? "waiting for an attention node" : details;
  if (!router) return details.empty() ? "waiting for a router" : details;
  return "";
}

}  // namespace

void AddStatuses(const Members& members, NodeId leader, v1::ClusterUpdate& update) {
  update.set_leader(leader.value);
  for (const auto& [id, report] : members) {
    v1::MemberStatus* status = update.add_statuses();
    status->set_node_id(id.value);
    *status->mutable_load() = report.load();
    *status->mutable_lost() = report.lost();
  }
}

bool OnlyLoadDiffers(const v1::MemberReport& before, const v1::MemberReport& now) {
  v1::MemberReport with_its_load = before;
  *with_its_load.mutable_load() = now.load();
  if (!now.has_load()) with_its_load.clear_load();
  return with_its_load.SerializeAsString() == now.SerializeAsString();
}

v1::ClusterView MakeView(const Members& members, const v1::PlacementRecord& record) {
  v1::ClusterView view;
  *view.mutable_epoch() = record.epoch();
  for (const auto& [id, report] : members) *view.add_members() = report.member();
  int64_t missing = 0;
  for (const v1::UnitReplicas& unit : record.placement()) {
    v1::UnitReplicas* out = view.add_placement();
    *out->mutable_unit() = unit.unit();
    for (int i = 0; i < unit.node_ids_size(); ++i) {
      if (!members.contains(NodeId{unit.node_ids(i)})) continue;
      out->add_node_ids(unit.node_ids(i));
      if (i < unit.weights_size()) out->add_weights(unit.weights(i));
    }
    missing += out->node_ids_size() == 0 ? 1 : 0;
  }
  view.set_not_ready_reason(NotReadyReason(members, record, record.placement_size(), missing));
  view.set_ready(view.not_ready_reason().empty());
  return view;
}

}  // namespace minke::cluster
