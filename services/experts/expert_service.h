// A whole expert server: engine thread, loader thread, membership, gRPC health. One per process, or one of
// the roles of `minke serve`. It hosts the units that the registry assigns to it: loads new ones beside the
// work that goes on, and lets go of those that others have taken over.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/base/mutex.h"
#include "libs/base/thread_pool.h"
#include "libs/cluster/rate_meter.h"
#include "libs/cluster/replica_set.h"
#include "libs/model/checkpoint.h"
#include "libs/registry/registry.h"
#include "libs/rpc/grpc_server.h"
#include "libs/tls/identity.h"
#include "libs/transport/transport.h"
#include "services/experts/compute/expert_backend.h"
#include "services/experts/engine/expert_engine.h"
#include "services/experts/shard/unit_sources.h"

namespace minke::experts {

struct ExpertServiceOptions {
  registry::RegistryAddress registry;
  std::string listen = "127.0.0.1:0";  // gRPC (health, reflection)
  std::string advertise_host;          // as others reach this host; empty: the host of `listen`
  std::shared_ptr<tls::Identity> identity = nullptr;  // of the cluster; null: plaintext
  Precision precision = Precision::kBF16;
  Device device = Device::kCpu;
  ExpertsFormat experts_format = ExpertsFormat::kBF16;
  int threads = 1;
  uint32_t slots = 0;  // units that fit its memory; 0: as many as it is given
  LoadFrom load_from = LoadFrom::kAuto;
  ExpertEngineOptions engine;
  registry::Registry::OnRefused on_refused;
};

// What it hosts, and what that has cost.
struct ExpertServiceStatus {
  NodeId node;
  std::vector<UnitId> hosted;
  int64_t hosted_bytes = 0;  // packed weights
  int64_t loading = 0, failed = 0,
          retiring = 0;  // units to load; that could not be; hosted, about to be let go
  struct Loads {
    uint64_t units = 0;  // since the start
    absl::Duration time;
  };
  std::array<Loads, 2> loaded;  // by UnitSource
};

class ExpertService {
 public:
  // INVALID_ARGUMENT for options that the device cannot have, FAILED_PRECONDITION without the device,
  // RESOURCE_EXHAUSTED where its memory is too small for the workspace.
  static absl::StatusOr<std::unique_ptr<ExpertService>> Start(std::shared_ptr<const Checkpoint> checkpoint,
                                                              std::unique_ptr<transport::Transport> transport,
                                                              ExpertServiceOptions options);
  ~ExpertService();
  ExpertEngine& engine() { return *engine_; }
  ExpertServiceStatus status() const;

  // Asks the others to take over what is hosted here, and waits until they have. DEADLINE_EXCEEDED if they
  // have not within `limit`; FAILED_PRECONDITION at once if nobody is there to do it; CANCELLED once
  // `give_up` says so.
  absl::Status Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up);

 private:
  ExpertService() = default;
  void OnUpdate(const cluster::v1::ClusterUpdate& update);
  void LoadLoop();
  // One unit in, or one out, if that is due. Whether there was anything to do.
  bool LoadNext();
  // From another server that has it, if there is one and that is faster; else from the checkpoint.
  absl::StatusOr<std::shared_ptr<const UnitWeights>> Load(UnitId unit);
  absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadFromReplica(UnitId unit,
                                                                     const UnitExchange::Giver& giver);
  std::optional<UnitExchange::Giver> GiverOf(UnitId unit);
  bool RetireNext();
  // How busy the server is; renewed every second, and reported if it has changed.
  void UpdateLoad();
  cluster::v1::MemberReport ReportLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::shared_ptr<const Checkpoint> checkpoint_;  // shared with the process's other roles
  ExpertServiceOptions options_;
  std::unique_ptr<ThreadPool> pool_, load_pool_;
  std::unique_ptr<ExpertBackend> backend_;
  std::unique_ptr<ExpertEngine> engine_;
  std::unique_ptr<rpc::GrpcServer> server_;
  std::unique_ptr<registry::Registry> client_;
  std::thread engine_thread_, load_thread_;
  cluster::RateMeter meter_;            // of the loader's thread
  std::optional<UnitSources> sources_;  // the loader's

  mutable Mutex mutex_;
  std::array<ExpertServiceStatus::Loads, 2> loaded_ ABSL_GUARDED_BY(mutex_);  // by UnitSource
  cluster::v1::Member self_ ABSL_GUARDED_BY(mutex_);
  cluster::v1::MemberLoad load_ ABSL_GUARDED_BY(mutex_);
  std::deque<UnitId> to_load_ ABSL_GUARDED_BY(mutex_);
  std::set<UnitId> assigned_ ABSL_GUARDED_BY(mutex_);
  std::map<UnitId, int64_t> hosted_ ABSL_GUARDED_BY(mutex_);                // bytes
  std::map<UnitId, cluster::ReplicaSet> replicas_ ABSL_GUARDED_BY(mutex_);  // published
  std::map<NodeId, std::string> addresses_ ABSL_GUARDED_BY(mutex_);         // data planes of expert servers
  std::set<UnitId> failed_ ABSL_GUARDED_BY(mutex_);                         // to load
  // Hosted, no longer assigned, and published elsewhere: let go at this time.
  std::map<UnitId, absl::Time> retiring_ ABSL_GUARDED_BY(mutex_);
  int64_t published_ ABSL_GUARDED_BY(mutex_) = 0;    // units whose rows may still be sent here
  bool successors_ ABSL_GUARDED_BY(mutex_) = true;   // somebody could take over
  bool report_due_ ABSL_GUARDED_BY(mutex_) = false;  // to the registry, by the loader's thread
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace minke::experts
