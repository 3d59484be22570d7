// One Inference.Generate call: a single sequence, its events written as they come. Deletes itself in OnDone.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <mutex>
#include <string>

#include "proto/inference/inference.grpc.pb.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/generation/choice.h"
#include "services/gateway/generation/event_queue.h"
#include "services/gateway/openai/generate_exchange.h"

namespace minke::gateway {

class GenerateReactor final : public grpc::ServerWriteReactor<inference::v1::GenerateResponse> {
 public:
  struct Request {
    std::shared_ptr<const TokenIds> prompt;
    Sampling sampling;
    std::vector<std::string> stops;
    RequestFacts facts;
    std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
  };
  // Refuses the call.
  explicit GenerateReactor(const grpc::Status& refusal)
      : context_{},
        record_(nullptr, {}),
        choice_(nullptr, {}),
        timer_(nullptr, SequenceTimer::Clock::now(), 0) {
    Finish(refusal);
  }
  GenerateReactor(const GenerateContext& context, Request request, Admission::Permit permit,
                  KeyAccount::Permit key_permit);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // What events of the pool meet: the reactor while it lives.
  struct Door {
    std::mutex mutex;
    GenerateReactor* reactor = nullptr;  // guarded by mutex
  };
  ~GenerateReactor() override = default;
  void PumpLocked();
  bool TakeLocked(SequenceEvent event, SequenceTimer::Clock::time_point received);

  const GenerateContext context_;
  Request request_;
  Admission::Permit permit_;
  KeyAccount::Permit key_permit_;
  const std::shared_ptr<Door> door_ = std::make_shared<Door>();  // shared with the event queue's wake
  std::shared_ptr<EventQueue> queue_;
  // Guarded by door_->mutex.
  uint64_t sequence_ = 0;
  RequestRecord record_;
  Choice choice_;
  SequenceTimer timer_;
  inference::v1::GenerateResponse response_;  // gRPC's while writing_
  inference::v1::GenerateResponse next_;      // what has come since
  bool has_next_ = false;
  bool writing_ = false;
  bool last_taken_ = false;
  bool finished_ = false;
  grpc::Status final_;
};

}  // namespace minke::gateway
