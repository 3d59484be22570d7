#include "services/gateway/api/generate_reactor.h"

#include <utility>

#include "services/gateway/attention_client/convert.h"
#include "services/gateway/openai/error.h"

namespace minke::gateway {

namespace v1 = inference::v1;

GenerateReactor::GenerateReactor(const GenerateContext& context, Request request, Admission::Permit permit,
                                 KeyAccount::Permit key_permit)
    : context_(context),
      request_(std::move(request)),
      permit_(std::move(permit)),
      key_permit_(std::move(key_permit)),
      record_(context.recorder, request_.facts),
      choice_(context.model->tokenizer.get(), request_.stops),
      timer_(&context.counters->requests, SequenceTimer::Clock::now(), request_.prompt->size()) {
  context_.counters->requests.n.Observe(1);
  context_.counters->requests.max_tokens.Observe(request_.sampling.max_tokens);
  context_.counters->generations.fetch_add(1);
  context_.counters->prompt_tokens.fetch_add(request_.prompt->size());
  queue_ = std::make_shared<EventQueue>([door = door_] {
    const std::lock_guard lock(door->mutex);
    if (door->reactor != nullptr) door->reactor->PumpLocked();
  });
  const uint64_t sequence = context_.pool->Start(
      {request_.prompt, request_.sampling, request_.deadline, record_.origin()}, queue_->SinkFor(0));
  const std::lock_guard lock(door_->mutex);
  sequence_ = sequence;
  door_->reactor = this;
  PumpLocked();  // what came before the door was open
}

void GenerateReactor::PumpLocked() {
  for (EventQueue::Item& item : queue_->Take()) {
    if (!last_taken_ && TakeLocked(std::move(item.event), item.received)) last_taken_ = true;
  }
  if (writing_ || finished_) return;
  if (has_next_) {
    response_.Swap(&next_);
    next_.Clear();
    has_next_ = false;
    writing_ = true;
    StartWrite(&response_);
  } else if (last_taken_) {
    finished_ = true;
    Finish(final_);
  }
}

// Merges an event into next_, so that a slow reader gets fewer, larger responses. True: it was the last one.
bool GenerateReactor::TakeLocked(SequenceEvent event, SequenceTimer::Clock::time_point received) {
  record_.OnEvent(event, received);
  if (event.finish == FinishReason::kError) {
    timer_.End(SequenceEnd::kError);
    const ApiError error = FromStatus(event.error);
    record_.End(error.http_status, error.message);
    const absl::Status status = ToStatus(error);
    final_ = grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                          std::string(status.message().data(), status.message().size()));
    return true;
  }
  for (const TokenLogprob& logprob : event.prompt_logprobs) ToProto(logprob, next_.add_prompt_logprobs());
  const FinishReason cluster_finish = event.finish;
  const std::chrono::microseconds queue_time = event.queue_time;
  const bool has_prompt = !event.prompt_logprobs.empty();
  ChoiceDelta delta = choice_.Take(std::move(event));
  timer_.OnEvent(received, delta.token_ids.size(), queue_time);
  timer_.End(delta.finish);
  if (!has_prompt && delta.token_ids.empty() && delta.finish == FinishReason::kNone) return false;
  context_.counters->completion_tokens.fetch_add(delta.token_ids.size());
  key_permit_.Generated(delta.token_ids.size());
  has_next_ = true;
  next_.set_request_id(request_.facts.request_id);
  next_.mutable_text()->append(delta.text);
  next_.mutable_token_ids()->Add(delta.token_ids.begin(), delta.token_ids.end());
  for (const TokenLogprob& logprob : delta.logprobs) ToProto(logprob, next_.add_logprobs());
  if (delta.finish == FinishReason::kNone) return false;
  record_.End(200, "");
  next_.set_finish_reason(ToProto(delta.finish));
  next_.set_prompt_tokens(static_cast<uint32_t>(request_.prompt->size()));
  next_.set_completion_tokens(choice_.completion_tokens());
  if (cluster_finish == FinishReason::kNone) context_.pool->Cancel(sequence_);  // a stop string
  return true;
}

void GenerateReactor::OnWriteDone(bool ok) {
  const std::lock_guard lock(door_->mutex);
  writing_ = false;
  if (!ok) {  // the caller left
    last_taken_ = true;
    has_next_ = false;
  }
  PumpLocked();
}

void GenerateReactor::OnCancel() {
  if (queue_ == nullptr) return;
  const std::lock_guard lock(door_->mutex);
  if (!last_taken_) {
    context_.counters->generations_abandoned.fetch_add(1);
    final_ = grpc::Status::CANCELLED;
  }
  last_taken_ = true;
  has_next_ = false;
  PumpLocked();
}

void GenerateReactor::OnDone() {
  if (queue_ != nullptr) {
    {
      const std::lock_guard lock(door_->mutex);
      door_->reactor = nullptr;
    }
    context_.pool->Cancel(sequence_);  // nothing if it ended by itself
  }
  delete this;
}

}  // namespace minke::gateway
