// The gRPC edge of the attention node: gateways' sessions in, engine events out.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "libs/base/mutex.h"
#include "proto/inference/inference.grpc.pb.h"
#include "services/attention/engine/engine.h"

namespace minke::attention {

// Thread-safe.
class AttentionApi final : public inference::v1::Attention::CallbackService {
 public:
  AttentionApi() = default;
  ~AttentionApi() override { Shutdown(); }
  // REQUIRES: before the gRPC server starts.
  void SetEngine(Engine* engine) { engine_ = engine; }
  // The engine's sink: sends each event to its session, and what can be reused to all.
  void Deliver(EngineOutput output);
  void Shutdown();

  grpc::ServerBidiReactor<inference::v1::GatewayMessage, inference::v1::AttentionMessage>* Session(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const inference::v1::GetStatusRequest* request,
                                      inference::v1::GetStatusResponse* response) override;

 private:
  class SessionStream;
  void OnGone(uint64_t session);

  Engine* engine_ = nullptr;
  Mutex mutex_;
  uint64_t next_session_ ABSL_GUARDED_BY(mutex_) = 1;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  // Shared with the thread that is delivering to one while its stream ends.
  std::map<uint64_t, std::shared_ptr<SessionStream>> sessions_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<uint64_t> prefixes_ ABSL_GUARDED_BY(mutex_);  // what a new session has to be told
};

}  // namespace minke::attention
