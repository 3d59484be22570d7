// The static registry: keeps the cluster's members by lease, decides which expert server hosts what, and
// sends every member the cluster's view whenever it changes. One router holds it; nothing outside this
// process does.
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
#include "libs/model/config.h"
#include "proto/cluster/cluster.grpc.pb.h"
#include "services/router/placement/placement_table.h"

namespace minke::router {

struct MembershipOptions {
  ModelConfig config;
  std::string model_fingerprint;
  std::string precision;
  int replicas = 1;
  int expert_servers = 1;  // to wait for before the first placement; 0: nothing is to be placed
  absl::Duration lease = absl::Seconds(3);
};

class MembershipService final : public cluster::v1::Membership::CallbackService {
 public:
  // Called on the timer thread, outside the lock, with every new view.
  using OnView = std::function<void(const cluster::v1::ClusterView&)>;
  // `self`: this router's own member entry.
  MembershipService(MembershipOptions options, cluster::v1::Member self, OnView on_view);
  ~MembershipService() override;

  grpc::ServerBidiReactor<cluster::v1::MemberReport, cluster::v1::ClusterUpdate>* Join(
      grpc::CallbackServerContext* context) override;

  void SetSelf(bool ready, std::string detail);
  // Ends every stream; joins after it are refused.
  void Shutdown();
  cluster::v1::ClusterView view() const;

 private:
  class Stream;
  struct State {
    cluster::v1::MemberReport report;
    Stream* stream = nullptr;
    absl::Time renewed;
  };

  // From streams.
  grpc::Status OnReport(Stream* stream, const cluster::v1::MemberReport& report);
  void OnGone(Stream* stream);
  void FillUpdate(NodeId member, bool with_view, cluster::v1::ClusterUpdate& update) const;

  void RebuildLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PlaceLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::string NotReadyReasonLocked() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void Timer();

  const MembershipOptions options_;
  const std::vector<UnitId> units_;
  const OnView on_view_;
  mutable Mutex mutex_;
  cluster::v1::Member self_ ABSL_GUARDED_BY(mutex_);
  std::map<NodeId, State> members_ ABSL_GUARDED_BY(mutex_);
  std::map<Stream*, std::shared_ptr<Stream>> streams_
      ABSL_GUARDED_BY(mutex_);  // shared with whoever is notifying them
  std::map<NodeId, std::vector<UnitId>> assignment_ ABSL_GUARDED_BY(mutex_);
  Epoch epoch_ ABSL_GUARDED_BY(mutex_);
  cluster::v1::ClusterView view_ ABSL_GUARDED_BY(mutex_);
  bool dirty_ ABSL_GUARDED_BY(mutex_) = false;  // view_ changed since it was last sent
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread timer_;
};

}  // namespace minke::router
