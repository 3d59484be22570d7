// The gateway's gRPC port: Inference.Generate, grpc.health.v1 and reflection. Thread-safe.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/tls/identity.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/keys/api_keys.h"
#include "services/gateway/openai/generate_exchange.h"

namespace minke::gateway {

class GrpcApi {
 public:
  struct Options {
    std::string listen;  // HOST:PORT; port 0: any free one
    GenerateContext context;
    Admission* admission = nullptr;
    std::shared_ptr<ApiKeys> keys;                // shared with the other edges; null: everybody may call
    std::function<std::string()> refusal_reason;  // why a new request is not taken; empty: it is
    std::shared_ptr<tls::Identity> identity;      // null: plaintext
  };
  // FAILED_PRECONDITION: the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<GrpcApi>> Start(Options options);
  ~GrpcApi();  // Shutdown(0) if it was not called

  int port() const;
  // What grpc.health.v1 says.
  void SetServing(bool serving);
  // Lets open calls finish until `grace` has passed, then cancels them.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  class Impl;
  explicit GrpcApi(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::gateway
