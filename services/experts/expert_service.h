// A whole expert server: engine thread, loader thread, membership, gRPC health. One per process, or one of
// the roles of `minke serve`.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "libs/base/mutex.h"
#include "libs/base/thread_pool.h"
#include "libs/model/checkpoint.h"
#include "libs/registry/registry.h"
#include "libs/rpc/grpc_server.h"
#include "libs/transport/transport.h"
#include "services/experts/compute/expert_backend.h"
#include "services/experts/engine/expert_engine.h"

namespace minke::experts {

struct ExpertServiceOptions {
  registry::RegistryAddress registry;
  std::string listen = "127.0.0.1:0";  // gRPC (health, reflection)
  std::string advertise_host;          // as others reach this host; empty: the host of `listen`
  Precision precision = Precision::kBF16;
  Device device = Device::kCpu;
  ExpertsFormat experts_format = ExpertsFormat::kBF16;
  int threads = 1;
  ExpertEngineOptions engine;
  registry::Registry::OnRefused on_refused;
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

 private:
  ExpertService() = default;
  void OnUpdate(const cluster::v1::ClusterUpdate& update);
  void LoadLoop();
  cluster::v1::MemberReport ReportLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::shared_ptr<const Checkpoint> checkpoint_;  // shared with the process's other roles
  ExpertServiceOptions options_;
  cluster::v1::Member self_;
  std::unique_ptr<ThreadPool> pool_, load_pool_;
  std::unique_ptr<ExpertBackend> backend_;
  std::unique_ptr<ExpertEngine> engine_;
  std::unique_ptr<rpc::GrpcServer> server_;
  std::unique_ptr<registry::Registry> client_;
  std::thread engine_thread_, load_thread_;

  Mutex mutex_;
  std::deque<UnitId> to_load_ ABSL_GUARDED_BY(mutex_);
  std::set<UnitId> assigned_ ABSL_GUARDED_BY(mutex_), hosted_ ABSL_GUARDED_BY(mutex_);
  int64_t not_loaded_ ABSL_GUARDED_BY(mutex_) = 0;  // units that failed to load
  int64_t hosted_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace minke::experts
