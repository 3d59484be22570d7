// A whole router: engine thread, registry, gRPC server. One per process, or one of the roles of `minke
// serve`.
#pragma once

#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "libs/model/checkpoint.h"
#include "libs/rpc/grpc_server.h"
#include "libs/transport/transport.h"
#include "services/router/api/membership_service.h"
#include "services/router/engine/router_engine.h"

namespace minke::router {

struct RouterServiceOptions {
  std::string listen = "127.0.0.1:0";  // gRPC
  std::string advertise_host;          // as others reach this host; empty: the host of `listen`
  Precision precision = Precision::kBF16;
  int replicas = 1;
  int spare_slots = 0;  // CoordinatorOptions
  int expert_servers =
      1;  // 0: the attention node has the experts (`minke serve` on a GPU), and nothing is routed
  int threads = 1;
  Gate::Override gate_override;  // tests only
};

class RouterService {
 public:
  static absl::StatusOr<std::unique_ptr<RouterService>> Start(std::shared_ptr<const Checkpoint> checkpoint,
                                                              std::unique_ptr<transport::Transport> transport,
                                                              RouterServiceOptions options);
  ~RouterService();
  const std::string& rpc_address() const { return rpc_address_; }
  RouterEngine& engine() { return *engine_; }
  MembershipService& membership() { return *membership_; }

 private:
  RouterService() = default;
  void OnView(const cluster::v1::ClusterView& view);

  std::string rpc_address_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<RouterEngine> engine_;
  std::unique_ptr<MembershipService> membership_;
  std::unique_ptr<rpc::GrpcServer> server_;
  std::thread engine_thread_, watch_thread_;
  std::atomic<bool> stop_{false};
};

}  // namespace minke::router
