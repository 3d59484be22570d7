// The static registry: keeps the cluster's members by lease and the placement's record, and sends every
// member the cluster's view whenever it changes. One router holds it; nothing outside this process does.
//
// A restarted router knows nothing: members join again and report what they host, which becomes the new
// table, under a new term. Thread-safe.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "libs/base/mutex.h"
#include "proto/cluster/cluster.grpc.pb.h"
#include "services/router/placement/coordinator.h"

namespace minke::router {

struct MembershipOptions {
  CoordinatorOptions coordinator;  // term and time to settle are chosen at the start
  absl::Duration lease = absl::Seconds(3);
};

class MembershipService final : public cluster::v1::Membership::CallbackService {
 public:
  // Called on the timer thread, outside the lock, with every new view.
  using OnView = std::function<void(const cluster::v1::ClusterView&)>;
  // `self`: this router's own report; others must have its model and precision.
  MembershipService(MembershipOptions options, cluster::v1::MemberReport self, OnView on_view);
  ~MembershipService() override;

  grpc::ServerBidiReactor<cluster::v1::MemberReport, cluster::v1::ClusterUpdate>* Join(
      grpc::CallbackServerContext* context) override;

  // Readiness, loads and lost servers of this router.
  void SetSelf(cluster::v1::MemberReport self);
  // Ends every stream; joins after it are refused.
  void Shutdown();
  cluster::v1::ClusterView view() const;

 private:
  class Stream;
  struct Lease {
    Stream* stream = nullptr;
    absl::Time renewed;
  };

  // From streams.
  grpc::Status OnReport(Stream* stream, const cluster::v1::MemberReport& report);
  void OnGone(Stream* stream);
  // `with_statuses`: if the member is a gateway.
  void FillUpdate(NodeId member, bool with_view, bool with_statuses,
                  cluster::v1::ClusterUpdate& update) const;

  void RebuildLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Timer();

  const MembershipOptions options_;
  const NodeId self_;
  const OnView on_view_;
  mutable Mutex mutex_;
  cluster::Members members_ ABSL_GUARDED_BY(mutex_);        // this router among them
  std::map<NodeId, Lease> leases_ ABSL_GUARDED_BY(mutex_);  // of all others
  std::map<Stream*, std::shared_ptr<Stream>> streams_
      ABSL_GUARDED_BY(mutex_);  // shared with whoever is notifying them
  cluster::v1::PlacementRecord record_ ABSL_GUARDED_BY(mutex_);
  cluster::v1::ClusterView view_ ABSL_GUARDED_BY(mutex_);
  bool dirty_ ABSL_GUARDED_BY(mutex_) = false;           // view_ or record_ changed since it was last sent
  bool statuses_dirty_ ABSL_GUARDED_BY(mutex_) = false;  // loads or lost servers of some report did
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread timer_;
};

}  // namespace minke::router
