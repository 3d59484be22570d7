#include "services/gateway/cluster_view/cluster_monitor.h"

#include <algorithm>
#include <set>
#include <string_view>
#include <utility>

#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

using namespace cluster::v1;  // NOLINT: enumerators of Role

constexpr absl::Duration kInARow = absl::Seconds(3);

const char* NameOf(Role role) {
  switch (role) {
    case ROLE_GATEWAY:
      return "gateway";
    case ROLE_ROUTER:
      return "router";
    case ROLE_ATTENTION:
      return "attention node";
    case ROLE_EXPERT:
      return "expert server";
    default:
      return "member";
  }
}

// As people call it: the beginning of its id tells it from others.
std::string Name(const MemberSnapshot& member) {
  return StrCat(NameOf(member.role), " ", ToString(member.id).substr(0, 8));
}

std::string AddressOf(const Member& member) {
  return member.rpc_address().empty() ? member.data_address() : member.rpc_address();
}

std::string HostOf(const std::string& address) { return address.substr(0, address.rfind(':')); }

}  // namespace

void ClusterMonitor::OnUpdate(const ClusterUpdate& update, absl::Time now) {
  const std::lock_guard lock(mutex_);
  if (update.has_view()) TakeViewLocked(update.view(), now);
  if (update.statuses_size() > 0) TakeStatusesLocked(update, now);
  TickLocked(now);
}

void ClusterMonitor::SetRegistryConnected(bool connected, absl::Time now) {
  const std::lock_guard lock(mutex_);
  if (std::exchange(cluster_.registry_connected, connected) == connected) return;
  if (!seen_view_) return;
  AddEventLocked("cluster", connected ? "the registry answers again" : "the registry does not answer",
                 NodeId{}, now);
}

void ClusterMonitor::NoteOperator(std::string text, absl::Time now) {
  const std::lock_guard lock(mutex_);
  AddEventLocked("operator", std::move(text), NodeId{}, now);
}

ClusterSnapshot ClusterMonitor::Snapshot(absl::Time now) {
  const std::lock_guard lock(mutex_);
  TickLocked(now);
  ClusterSnapshot snapshot = cluster_;
  snapshot.at = now;
  for (const Known& known : members_) snapshot.members.push_back(known.shown);
  snapshot.events.assign(events_.begin(), events_.end());
  return snapshot;
}

void ClusterMonitor::TakeViewLocked(const ClusterView& view, absl::Time now) {
  cluster_.registry_connected = true;
  const minke::Epoch epoch{view.epoch().term(), view.epoch().counter()};
  if (epoch != std::exchange(cluster_.epoch, epoch)) {
    // While a cluster starts there is one every few milliseconds.
    const std::string text = StrCat("placement epoch ", epoch.term, ".", epoch.counter);
    std::erase_if(events_, [now](const ClusterEvent& event) {
      return event.kind == std::string_view("epoch") && now - event.at < kInARow;
    });
    AddEventLocked("epoch", text, NodeId{}, now);
  }
  const bool was_ready = std::exchange(cluster_.ready, view.ready());
  cluster_.not_ready_reason = view.not_ready_reason();
  if (was_ready != view.ready()) {
    AddEventLocked("cluster",
                   view.ready() ? "the cluster is ready" : StrCat("not ready: ", view.not_ready_reason()),
                   NodeId{}, now);
  }

  std::set<uint32_t> layers;
  std::map<uint64_t, uint32_t> units;
  for (const UnitReplicas& unit : view.placement()) {
    layers.insert(unit.unit().layer());
    for (const uint64_t id : unit.node_ids()) ++units[id];
  }
  cluster_.layers.assign(layers.begin(), layers.end());

  view_.clear();
  for (const Member& member : view.members()) view_[NodeId{member.node_id()}] = member;
  for (const auto& [id, member] : view_) {
    Known* known = FindLocked(id);
    if (known == nullptr) {
      if (members_.size() >= kMembersMax) continue;
      known = &members_.emplace_back();
      known->shown.id = id;
      known->shown.role = member.role();
      known->shown.since = known->joined = now;
      known->shown.address = AddressOf(member);
      if (seen_view_) AddEventLocked("joined", StrCat(Name(known->shown), " joined"), id, now);
    }
    known->in_view = true;
    known->shown.address = AddressOf(member);
    known->shown.pid = member.pid();
    known->shown.detail = member.detail();
    known->shown.units = units[id.value];
    RefreshStateLocked(*known, member, now);
  }
  for (Known& known : members_) {
    if (view_.contains(known.shown.id) || !known.in_view) continue;
    known.in_view = false;
    known.absent_since = now;
    known.shown.load.Clear();
  }
  seen_view_ = true;
}

void ClusterMonitor::TakeStatusesLocked(const ClusterUpdate& update, absl::Time now) {
  std::set<uint64_t> unreachable;
  for (const MemberStatus& status : update.statuses()) {
    unreachable.insert(status.lost().begin(), status.lost().end());
    Known* known = FindLocked(NodeId{status.node_id()});
    if (known == nullptr || !known->in_view) continue;
    const uint64_t before = known->shown.load.redispatched_rows();
    const uint64_t after = status.load().redispatched_rows();
    if (std::exchange(known->has_redispatched, true) && after > before) {
      CountLocked("failover", StrCat(" rows sent to experts again by ", Name(known->shown)), after - before,
                  known->shown.id, now);
    }
    known->shown.load = status.load();
  }
  for (Known& known : members_) {
    const bool was = std::exchange(known.unreachable, unreachable.contains(known.shown.id.value));
    const auto member = view_.find(known.shown.id);
    if (was != known.unreachable && member != view_.end()) RefreshStateLocked(known, member->second, now);
  }
  const NodeId leader{update.leader()};
  if (std::exchange(cluster_.leader, leader) == leader || leader == NodeId{}) return;
  AddEventLocked("leader", StrCat("router ", ToString(leader).substr(0, 8), " decides the placement"), leader,
                 now);
}

void ClusterMonitor::TickLocked(absl::Time now) {
  for (Known& known : members_) {
    if (known.in_view || known.shown.state == MemberState::kLost || known.shown.state == MemberState::kLeft)
      continue;
    if (known.shown.state == MemberState::kDraining) {
      SetStateLocked(known, MemberState::kLeft, now);
    } else if (now - known.absent_since >= kAbsentGrace) {
      SetStateLocked(known, MemberState::kLost, now);
    }
  }
  for (Known& known : members_) {
    const absl::Duration shown = now - known.shown.since;
    known.forget =
        !known.in_view && ((known.shown.state == MemberState::kLeft && shown >= kLeftShown) ||
                           (known.shown.state == MemberState::kLost &&
                            (shown >= kLostShownMax || (shown >= kLostShownMin && TakePlaceLocked(known)))));
  }
  std::erase_if(members_, [](const Known& known) { return known.forget; });
  const auto count = [&](uint64_t& before, uint64_t after, const char* text) {
    if (after > before) CountLocked("failover", text, after - before, NodeId{}, now);
    before = after;
  };
  count(resubmissions_, counters_.resubmissions.load(),
        " sequences moved on from an attention node that was lost or silent");
  count(migrations_, counters_.migrations.load(), " sequences moved on from a draining attention node");
}

// Whether somebody who came when `lost` went or after that stands in for it now; nobody stands in for two.
bool ClusterMonitor::TakePlaceLocked(const Known& lost) {
  const auto successor = std::find_if(members_.begin(), members_.end(), [&](const Known& known) {
    return known.in_view && !known.takes_a_place && known.shown.state == MemberState::kReady &&
           known.shown.role == lost.shown.role && HostOf(known.shown.address) == HostOf(lost.shown.address) &&
           known.joined + kNoticedWithin >= lost.shown.since;
  });
  if (successor == members_.end()) return false;
  successor->takes_a_place = true;
  return true;
}

void ClusterMonitor::RefreshStateLocked(Known& known, const Member& member, absl::Time now) {
  SetStateLocked(known,
                 known.unreachable   ? MemberState::kLost
                 : member.draining() ? MemberState::kDraining
                 : member.ready()    ? MemberState::kReady
                                     : MemberState::kLoading,
                 now);
}

void ClusterMonitor::SetStateLocked(Known& known, MemberState state, absl::Time now) {
  const MemberState before = std::exchange(known.shown.state, state);
  if (before == state) return;
  known.shown.since = now;
  if (!seen_view_) return;  // what was so before this gateway looked is no event
  const auto add = [&](const char* kind, const char* what) {
    AddEventLocked(kind, StrCat(Name(known.shown), what), known.shown.id, now);
  };
  switch (state) {
    case MemberState::kLoading:
      return add("unready", " is not ready any more");
    case MemberState::kReady:
      return add("ready", before == MemberState::kLost ? " is back" : " is ready");
    case MemberState::kDraining:
      return add("draining", " is draining");
    case MemberState::kLost:
      return add("lost", known.in_view ? " cannot be reached by routers" : " was lost");
    case MemberState::kLeft:
      return add("left", " left");
  }
}

ClusterMonitor::Known* ClusterMonitor::FindLocked(NodeId id) {
  const auto it = std::find_if(members_.begin(), members_.end(),
                               [id](const Known& known) { return known.shown.id == id; });
  return it == members_.end() ? nullptr : &*it;
}

ClusterEvent& ClusterMonitor::AddEventLocked(const char* kind, std::string text, NodeId node,
                                             absl::Time now) {
  if (events_.size() >= kEventsMax) events_.pop_front();
  return events_.emplace_back(ClusterEvent{next_event_++, now, kind, std::move(text), node});
}

void ClusterMonitor::CountLocked(const char* kind, const std::string& text, uint64_t more, NodeId node,
                                 absl::Time now) {
  const auto same = std::find_if(events_.begin(), events_.end(), [&](const ClusterEvent& event) {
    return event.kind == std::string_view(kind) && event.node == node && now - event.at < kInARow &&
           event.text.ends_with(text);
  });
  ClusterEvent& event = same != events_.end() ? *same : AddEventLocked(kind, "", node, now);
  event.count += more;
  event.text = StrCat(event.count, text);
}

}  // namespace minke::gateway
