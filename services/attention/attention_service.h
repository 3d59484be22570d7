// A whole attention node: engine thread, gRPC edge, membership. One per process, or one of the roles of
// `minke serve`.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/base/device.h"
#include "libs/registry/registry.h"
#include "libs/rpc/grpc_server.h"
#include "libs/tls/identity.h"
#include "services/attention/api/attention_api.h"
#include "services/attention/api/weights_api.h"
#include "services/attention/engine/engine.h"

namespace minke::attention {

struct AttentionServiceOptions {
  registry::RegistryAddress registry;
  std::string listen = "127.0.0.1:0";  // gRPC
  std::string advertise_host;          // as others reach this host; empty: the host of `listen`
  std::shared_ptr<tls::Identity> identity = nullptr;  // of the cluster; null: plaintext
  Precision precision = Precision::kBF16;
  MlaChoice mla = MlaChoice::kAuto;  // auto: naive for long chunks; absorbed for all in exact mode
  Device device = Device::kCpu;
  int tensor_parallel = 1;  // ranks that share out the heads and inner dimensions
  // On a GPU: the routed experts here too, no expert servers (`minke serve --device=cuda`); with fp8 weights.
  bool whole = false;
  bool fp8_experts = false;
  // On a GPU: host:port of a running attention node that gives its weights; or empty.
  std::string weights_from;
  bool local_routing = false;
  int threads = 1;
  EngineOptions engine;
  tracing::TracerOptions traces;         // without an endpoint: none
  std::vector<uint8_t> allowed_tokens;   // [vocab] 0/1: ids that have a token; empty: all
  router::Gate::Override gate_override;  // tests only, with local_routing
  // Tests only: a model in place of the one that was loaded, before it is prepared.
  std::function<std::unique_ptr<AttentionModel>(std::unique_ptr<AttentionModel>)> wrap_model;
  registry::Registry::OnRefused on_refused;
};

class AttentionService {
 public:
  static absl::StatusOr<std::unique_ptr<AttentionService>> Start(
      std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
      AttentionServiceOptions options);
  ~AttentionService();
  // Reports that it is about to leave, so that gateways give it nothing new and move what it has to other
  // nodes, and waits until nothing is left and nobody takes pages from here. DEADLINE_EXCEEDED after `limit`;
  // CANCELLED when `give_up` is true. Destruction comes next.
  absl::Status Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up);
  Engine& engine() { return *engine_; }
  const tracing::Tracer* tracer() const { return tracer_.get(); }  // null: no traces
  NodeId node_id() const { return NodeId{self_.node_id()}; }
  const std::string& rpc_address() const { return self_.rpc_address(); }

 private:
  AttentionService() = default;

  AttentionServiceOptions options_;
  cluster::v1::Member self_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<tracing::Tracer> tracer_;  // null: no traces
  std::unique_ptr<Engine> engine_;
  AttentionApi api_;
  std::unique_ptr<WeightGiver> giver_;
  WeightsApi weights_api_;
  std::unique_ptr<rpc::GrpcServer> server_;
  std::unique_ptr<registry::Registry> client_;
  std::thread engine_thread_, watch_thread_;
  std::atomic<bool> stop_{false}, draining_{false};
};

}  // namespace minke::attention
