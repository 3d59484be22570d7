// Answers one generation request: starts its sequences, turns their events into a whole answer or a stream.
// Used by one thread at a time. Destroyed early, it cancels what still runs.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "libs/http/exchange.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/generation/choice.h"
#include "services/gateway/generation/event_queue.h"
#include "services/gateway/generation/request_record.h"
#include "services/gateway/generation/sequence_pool.h"
#include "services/gateway/keys/key_account.h"
#include "services/gateway/openai/format.h"
#include "services/gateway/openai/request.h"

namespace minke::gateway {

// What every generation shares; outlives them all.
struct GenerateContext {
  const GatewayModel* model = nullptr;
  SequencePool* pool = nullptr;
  GatewayCounters* counters = nullptr;
  std::chrono::milliseconds silence_max{600'000};  // no event of any of its sequences for so long: 503
  const RequestRecorder* recorder = nullptr;       // null: no traces, no slow requests in the log
};

class GenerateExchange final : public Exchange {
 public:
  GenerateExchange(const GenerateContext& context, GenerateRequest request, Admission::Permit permit,
                   KeyAccount::Permit key_permit, const HttpRequest& http, std::function<void()> wake);
  ~GenerateExchange() override;
  void Poll(Output* out) override;
  std::chrono::steady_clock::time_point deadline() const override { return std::min(silent_at_, late_at_); }

 private:
  using Clock = std::chrono::steady_clock;
  struct Sequence {
    Sequence(Choice choice_in, SequenceTimer timer_in)
        : choice(std::move(choice_in)), timer(std::move(timer_in)) {}
    uint64_t id = 0;
    Choice choice;
    SequenceTimer timer;
    bool echoed = false;  // or nothing to echo
    bool first_chunk = true;
    std::vector<TokenLogprob> prompt_logprobs;  // until echoed
    ChoiceContent content;                      // whole answers: grows
  };

  void Take(uint32_t index, SequenceEvent event, Clock::time_point received, Output* out);
  void Echo(uint32_t index, Output* out);
  void Emit(uint32_t index, ChoiceContent content, Output* out);
  void Fail(const ApiError& error, Output* out);
  void Finish(Output* out);
  void CancelAll();
  const PreparedPrompt& PromptOf(uint32_t index) const { return request_.prompts[index / request_.n]; }
  ChoiceContent NewContent(uint32_t index) const;

  const GenerateContext context_;
  const GenerateRequest request_;
  const Admission::Permit permit_;
  KeyAccount::Permit key_permit_;
  const std::vector<std::pair<std::string, std::string>> key_headers_;
  AnswerHead head_;
  RequestRecord record_;
  const std::shared_ptr<EventQueue> queue_;  // shared with the sinks
  std::vector<Sequence> sequences_;          // by index: prompt * n + choice
  size_t unfinished_;
  uint64_t cached_tokens_ = 0;
  bool head_sent_ = false;
  bool done_ = false;
  std::chrono::steady_clock::time_point silent_at_, late_at_;
};

// An answer that is known at once.
class ImmediateExchange final : public Exchange {
 public:
  ImmediateExchange(HttpHead head, std::string body) : head_(std::move(head)), body_(std::move(body)) {}
  explicit ImmediateExchange(const ApiError& error);
  void Poll(Output* out) override {
    out->head = head_;
    out->body = body_;
    out->done = true;
  }
  std::chrono::steady_clock::time_point deadline() const override {
    return std::chrono::steady_clock::time_point::max();
  }

 private:
  HttpHead head_;
  std::string body_;
};

HttpHead ErrorHead(const ApiError& error);

}  // namespace minke::gateway
