// Follows the cluster for people: who is there, in which state, how busy, and what happened lately. Remembers
// members that have gone for a while, so that a loss is seen. Thread-safe; times are the caller's, so that
// tests need not wait.
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/cluster/cluster.pb.h"
#include "services/gateway/cluster_view/snapshot.h"
#include "services/gateway/generation/admission.h"

namespace minke::gateway {

class ClusterMonitor {
 public:
  static constexpr size_t kEventsMax = 64;
  static constexpr size_t kMembersMax = 1024;  // those beyond are not shown
  // A member that is absent from the view for less has not gone: after a router's restart all join again.
  static constexpr absl::Duration kAbsentGrace = absl::Seconds(1);
  static constexpr absl::Duration kLeftShown = absl::Seconds(10);
  // A lost member is shown until somebody has taken its place, but so long at least and at most.
  // Until a loss is seen: etcd's lease. Who came in the meantime can be the successor already.
  static constexpr absl::Duration kNoticedWithin = absl::Seconds(5);
  static constexpr absl::Duration kLostShownMin = absl::Seconds(5), kLostShownMax = absl::Seconds(60);

  // `counters` is borrowed.
  explicit ClusterMonitor(const GatewayCounters* counters) : counters_(*counters) {}

  void OnUpdate(const cluster::v1::ClusterUpdate& update, absl::Time now);
  void SetRegistryConnected(bool connected, absl::Time now);
  // What somebody did by way of this gateway.
  void NoteOperator(std::string text, absl::Time now);
  ClusterSnapshot Snapshot(absl::Time now);

 private:
  struct Known {
    MemberSnapshot shown;
    absl::Time joined;
    bool in_view = true;
    bool unreachable = false;    // say routers
    bool takes_a_place = false;  // of one that was lost
    bool has_redispatched = false;
    bool forget = false;
    absl::Time absent_since;
  };

  void TakeViewLocked(const cluster::v1::ClusterView& view, absl::Time now);
  void TakeStatusesLocked(const cluster::v1::ClusterUpdate& update, absl::Time now);
  // What time and the gateway's own counters have brought.
  void TickLocked(absl::Time now);
  void RefreshStateLocked(Known& known, const cluster::v1::Member& member, absl::Time now);
  void SetStateLocked(Known& known, MemberState state, absl::Time now);
  bool TakePlaceLocked(const Known& lost);
  Known* FindLocked(NodeId id);
  ClusterEvent& AddEventLocked(const char* kind, std::string text, NodeId node, absl::Time now);
  // One event per kind and node while they come in a row.
  void CountLocked(const char* kind, const std::string& text, uint64_t more, NodeId node, absl::Time now);

  const GatewayCounters& counters_;
  std::mutex mutex_;
  // Guarded by mutex_.
  ClusterSnapshot cluster_;  // but members
  std::vector<Known> members_;
  std::map<NodeId, cluster::v1::Member> view_;  // the last one
  std::deque<ClusterEvent> events_;
  bool seen_view_ = false;
  uint64_t resubmissions_ = 0, migrations_ = 0;
  uint64_t next_event_ = 1;
};

}  // namespace minke::gateway
