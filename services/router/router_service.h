// A whole router: engine thread, registry, gRPC server. One per process, or one of the roles of `minke
// serve`.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/base/thread_pool.h"
#include "libs/model/checkpoint.h"
#include "libs/registry/registry.h"
#include "libs/rpc/grpc_server.h"
#include "libs/tls/identity.h"
#include "libs/transport/transport.h"
#include "services/router/api/membership_service.h"
#include "services/router/engine/router_engine.h"
#include "services/router/registry/elected_coordinator.h"
#include "services/router/telemetry/cluster_counters.h"

namespace minke::router {

struct RouterServiceOptions {
  std::string listen = "127.0.0.1:0";  // gRPC
  std::string advertise_host;          // as others reach this host; empty: the host of `listen`
  std::shared_ptr<tls::Identity> identity = nullptr;  // of the cluster; null: plaintext
  Precision precision = Precision::kBF16;
  Device device = Device::kCpu;  // of the gate
  bool device_optional = false;  // the CPU if the gate cannot be on the GPU (shape, memory)
  int replicas = 1;
  int spare_slots = 0;  // CoordinatorOptions
  int expert_servers =
      1;  // 0: the attention node has the experts (`minke serve` on a GPU), and nothing is routed
  int threads = 1;
  registry::RegistryAddress registry;        // with etcd: members and placement lie there; otherwise here
  registry::Registry::OnRefused on_refused;  // with etcd
  Gate::Override gate_override;              // tests only
};

class RouterService {
 public:
  static absl::StatusOr<std::unique_ptr<RouterService>> Start(std::shared_ptr<const Checkpoint> checkpoint,
                                                              std::unique_ptr<transport::Transport> transport,
                                                              RouterServiceOptions options);
  ~RouterService();
  // Tells the others to go to another router, and gives them a moment to finish what is here. Nothing with a
  // static registry: there is no other router.
  void Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up);
  const std::string& rpc_address() const { return rpc_address_; }
  RouterEngine& engine() { return *engine_; }
  MembershipService& membership() { return *membership_; }  // REQUIRES: no etcd
  const ClusterCounters& cluster_counters() const { return cluster_counters_; }
  // Whether this router decides the placement.
  bool leads() const { return coordinator_ == nullptr || coordinator_->leading(); }

 private:
  RouterService() = default;
  void OnView(const cluster::v1::ClusterView& view);
  void JoinEtcd(const RouterServiceOptions& options, CoordinatorOptions coordinator,
                const cluster::v1::MemberReport& report);

  std::string rpc_address_;
  std::unique_ptr<ThreadPool> pool_;
  ClusterCounters cluster_counters_;
  std::unique_ptr<RouterEngine> engine_;
  std::unique_ptr<MembershipService> membership_;     // static registry; otherwise
  std::unique_ptr<registry::EtcdRegistry> registry_;  // this, and
  std::unique_ptr<ElectedCoordinator> coordinator_;   // who decides
  std::unique_ptr<rpc::GrpcServer> server_;
  std::thread engine_thread_, watch_thread_;
  std::atomic<bool> stop_{false}, draining_{false};
};

}  // namespace minke::router
