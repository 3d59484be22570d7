// The gateway: OpenAI-compatible HTTP API and the same generation over gRPC in front, attention nodes behind.
// Used by minke-gateway and by `minke serve`. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "libs/base/ids.h"
#include "libs/http/server.h"
#include "libs/telemetry/metrics_server.h"
#include "libs/tls/identity.h"
#include "libs/tracing/tracer.h"
#include "services/gateway/attention_client/attention_pool.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/generation/types.h"

namespace minke::cluster::v1 {
class ClusterUpdate;
class ClusterView;
}  // namespace minke::cluster::v1

namespace minke::gateway {

struct GatewayOptions {
  HttpServerOptions http;
  std::string grpc_listen = "127.0.0.1:0";         // HOST:PORT; port 0: any free one; empty: no gRPC API
  std::string api_key_file;                        // one key per line, # comments; empty: everybody may call
  int64_t sequences_max = 4096;                    // running and waiting at once (choices count); above: 429
  std::chrono::milliseconds silence_max{600'000};  // a request none of whose sequences moves for so long: 503
  // New requests wait as long for a cluster that was ready and no longer is, as those aboard do; then 503. 0:
  // not at all.
  std::chrono::milliseconds unready_wait{0};
  AttentionPoolOptions attention;
  tracing::TracerOptions traces;  // without an endpoint: none
  double trace_ratio = 0.01;      // of requests whose client does not say whether they are traced
  std::chrono::milliseconds slow_request{60'000};  // those that take longer are logged with phases; 0: none
  bool vllm_names = false;  // /metrics also shows the cluster under the names of vLLM's metrics
  // The cluster's view and the console (docs/console.md).
  NodeId node_id;                   // of this gateway in the registry
  std::string registry = "static";  // for people
  // Both or neither: where `minke up` can be asked to scale and to drain, and the tokens that callers need.
  std::string operator_socket, operator_token_file;
  std::shared_ptr<tls::Identity> public_identity = nullptr;   // of the HTTP and the gRPC API; null: plaintext
  std::shared_ptr<tls::Identity> cluster_identity = nullptr;  // at attention nodes; null: plaintext
};

// The checkpoint as a gateway needs it: config.json, and the tokenizer where there is one.
//   model_name     what /v1/models lists; empty: the folder's name
//   chat_template  "auto" or empty: as tokenizer_config.json says; else v2-chat, v2-chat-0628, v2.5
absl::StatusOr<GatewayModel> LoadGatewayModel(const std::string& checkpoint_directory,
                                              std::string_view model_name, std::string_view chat_template);

class Gateway {
 public:
  // Listens, not ready until UpdateView brings a ready view and an attention node's session is up.
  // INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION (a port in use): one line that says what.
  static absl::StatusOr<std::unique_ptr<Gateway>> Create(GatewayOptions options, GatewayModel model);
  ~Gateway();  // Shutdown(0) if it was not called

  // What the registry tells; from one thread at a time. Logs `ready` with the address when it becomes so.
  void OnUpdate(const cluster::v1::ClusterUpdate& update);
  // Whether the registry answers, for people; from any thread.
  void SetRegistryConnected(bool connected);
  // An update that is a view only.
  void UpdateView(const cluster::v1::ClusterView& view);

  // What /metrics shows besides the gateway's own; for `minke serve`, whose other roles have no server of
  // their own.
  void AddMetrics(telemetry::Collector collector);

  int port() const;       // HTTP
  int grpc_port() const;  // 0: no gRPC API
  NodeId node_id() const;
  std::string rpc_address() const;  // of the gRPC API, empty without
  // Why requests cannot be served; empty: they can. What /health says.
  std::string not_ready_reason() const;
  const GatewayCounters& counters() const;
  int64_t active_sequences() const;
  int connections() const;
  // Refuses new requests with 503, as /health then says, and waits until the open ones have finished, `limit`
  // has passed or `give_up` is true. Whether they finished; Shutdown comes next.
  bool Drain(std::chrono::milliseconds limit, const std::function<bool()>& give_up);
  // Stops accepting, lets open requests finish until `grace` has passed, drops the rest. Idempotent.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  class Impl;
  explicit Gateway(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::gateway
