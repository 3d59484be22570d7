#include "services/attention/api/attention_api.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::attention {

using inference::v1::AttentionMessage;
using inference::v1::GatewayMessage;

namespace {

// Events a gateway has not taken yet; one that falls this far behind is cut off instead of growing memory
// here.
constexpr int kPendingEventsMax = 1 << 16;
constexpr size_t kNameMax = 256;
constexpr int kPendingPrefixesMax = 1 << 22;

// INVALID_ARGUMENT names the field, what was expected and found.
absl::StatusOr<Request> ToRequest(uint64_t session, const inference::v1::Submit& submit,
                                  const ModelConfig& config) {
  const auto& s = submit.sampling();
  const auto bad = [](const std::string& text) { return absl::InvalidArgumentError(text); };
  if (submit.prompt_token_ids().empty()) return bad("prompt_token_ids: expected at least one, found none");
  for (const auto* ids : {&submit.prompt_token_ids(), &submit.generated_token_ids()}) {
    for (const uint32_t id : *ids) {
      if (id >= static_cast<uint32_t>(config.vocab_size)) {
        return bad(StrCat("token id: expected below ", config.vocab_size, ", found ", id));
      }
    }
  }
  const int64_t length = submit.prompt_token_ids_size() + int64_t{s.max_tokens()};
  if (length > config.max_position_embeddings) {
    return bad(StrCat("prompt and max_tokens: expected at most ", config.max_position_embeddings,
                      " tokens, found ", length));
  }
  if (!(s.temperature() >= 0) || !(s.top_p() >= 0 && s.top_p() <= 1) || !(s.min_p() >= 0 && s.min_p() <= 1) ||
      !(s.repetition_penalty() >= 0)) {
    return bad("sampling: temperature, top_p, min_p or repetition_penalty out of range");
  }
  Request request;
  request.key = {session, submit.request_id(), submit.generation()};
  request.prompt.assign(submit.prompt_token_ids().begin(), submit.prompt_token_ids().end());
  request.generated.assign(submit.generated_token_ids().begin(), submit.generated_token_ids().end());
  request.pages_from = NodeId{submit.pages_from()};
  if (submit.request_name().size() > kNameMax || submit.traceparent().size() > kNameMax) {
    return bad(StrCat("request_name and traceparent: expected at most ", kNameMax, " bytes, found ",
                      std::max(submit.request_name().size(), submit.traceparent().size())));
  }
  request.name = submit.request_name();
  request.traceparent = submit.traceparent();
  SamplingParams& p = request.sampling;
  p.temperature = s.temperature();
  p.top_p = s.top_p() == 0 ? 1 : s.top_p();
  p.top_k = s.top_k();
  p.min_p = s.min_p();
  p.presence_penalty = s.presence_penalty();
  p.frequency_penalty = s.frequency_penalty();
  p.repetition_penalty = s.repetition_penalty() == 0 ? 1 : s.repetition_penalty();
  p.seed = s.seed();
  for (const auto& bias : s.logit_bias()) {
    if (bias.token_id() >= static_cast<uint32_t>(config.vocab_size))
      return bad(StrCat("logit_bias: token id ", bias.token_id()));
    p.logit_bias.emplace_back(bias.token_id(), bias.bias());
  }
  p.stop_token_ids.assign(s.stop_token_ids().begin(), s.stop_token_ids().end());
  p.max_tokens = s.max_tokens();
  p.want_logprobs = s.want_logprobs();
  p.top_logprobs = s.top_logprobs();
  p.want_prompt_logprobs = s.want_prompt_logprobs();
  p.top_prompt_logprobs = s.top_prompt_logprobs();
  if (submit.waiting_ms_max() > 0)
    request.waiting_until = absl::Now() + absl::Milliseconds(submit.waiting_ms_max());
  if (submit.deadline_ms() > 0) {
    request.deadline = absl::Now() + absl::Milliseconds(submit.deadline_ms());
    request.waiting_until = std::min(request.waiting_until, request.deadline);
  }
  return request;
}

void ToProto(const TokenLogprobs& from, inference::v1::TokenLogprobs& to) {
  to.set_token_id(from.token);
  to.set_logprob(from.logprob);
  for (const auto& [token, logprob] : from.top) {
    to.add_top_token_ids(token);
    to.add_top_logprobs(logprob);
  }
}

inference::v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return inference::v1::FINISH_REASON_NONE;
    case FinishReason::kStop:
      return inference::v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return inference::v1::FINISH_REASON_LENGTH;
    case FinishReason::kError:
      return inference::v1::FINISH_REASON_ERROR;
  }
  return inference::v1::FINISH_REASON_ERROR;
}

void ToProto(const PhaseTimes& from, inference::v1::PhaseTimes& to) {
  const auto us = [&](StepPhase phase) {
    return static_cast<uint64_t>(1e6 * from.seconds[static_cast<int>(phase)]);
  };
  to.set_steps(from.steps);
  to.set_plan_us(us(StepPhase::kPlan));
  to.set_attention_us(us(StepPhase::kAttention));
  to.set_dispatch_us(us(StepPhase::kDispatch));
  to.set_shared_experts_us(us(StepPhase::kSharedExperts));
  to.set_wait_us(us(StepPhase::kWait));
  to.set_combine_us(us(StepPhase::kCombine));
  to.set_head_us(us(StepPhase::kHead));
  to.set_sampling_us(us(StepPhase::kSampling));
  to.set_output_us(us(StepPhase::kOutput));
}

void ToProto(const RequestEvent& from, inference::v1::Event& to) {
  to.set_request_id(from.key.request);
  to.set_generation(from.key.generation);
  for (const uint32_t token : from.tokens) to.add_token_ids(token);
  for (const TokenLogprobs& logprobs : from.logprobs) ToProto(logprobs, *to.add_logprobs());
  for (const TokenLogprobs& logprobs : from.prompt_logprobs) ToProto(logprobs, *to.add_prompt_logprobs());
  to.set_cached_prompt_tokens(static_cast<uint32_t>(from.cached_prompt_tokens));
  to.set_queue_us(
      static_cast<uint64_t>(absl::ToInt64Microseconds(std::max(from.queue_time, absl::ZeroDuration()))));
  to.set_finish_reason(ToProto(from.finish));
  if (from.prefill_times.steps > 0) ToProto(from.prefill_times, *to.mutable_prefill_times());
  if (from.decode_times.steps > 0) ToProto(from.decode_times, *to.mutable_decode_times());
  if (!from.error.ok()) {
    to.mutable_error()->set_code(static_cast<uint32_t>(from.error.code()));
    to.mutable_error()->set_message(std::string(from.error.message()));
  }
}

}  // namespace

class AttentionApi::SessionStream final : public grpc::ServerBidiReactor<GatewayMessage, AttentionMessage> {
 public:
  SessionStream(AttentionApi& api, uint64_t id) : api_(api), id_(id) {}
  void Start() { StartRead(&message_); }

  void Add(std::vector<const RequestEvent*> events) {
    const MutexLock lock(mutex_);
    if (finished_) return;
    for (const RequestEvent* event : events) ToProto(*event, *pending_.add_events());
    if (pending_.events_size() > kPendingEventsMax) {
      return CloseLocked(
          grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the gateway does not read its events"));
    }
    WriteNextLocked();
  }
  void AddPrefixes(std::span<const PrefixChange> changes) {
    const MutexLock lock(mutex_);
    if (finished_) return;
    for (const PrefixChange& change : changes) {
      pending_.add_prefixes(change.name);
      pending_.add_prefix_gained(change.gained);
    }
    if (pending_.prefixes_size() > kPendingPrefixesMax) {
      return CloseLocked(
          grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the gateway does not read its messages"));
    }
    WriteNextLocked();
  }
  void AnswerBeat(uint64_t number) {
    const MutexLock lock(mutex_);
    if (finished_) return;
    pending_.set_beat(number);
    WriteNextLocked();
  }
  void Close(const grpc::Status& status) {
    const MutexLock lock(mutex_);
    CloseLocked(status);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return Close(grpc::Status::OK);
    if (message_.has_submit()) {
      absl::StatusOr<Request> request = ToRequest(id_, message_.submit(), api_.engine_->config());
      const absl::Status status = request.ok() ? api_.engine_->Submit(*std::move(request)) : request.status();
      if (!status.ok()) {
        const RequestEvent refused{
            .key = {id_, message_.submit().request_id(), message_.submit().generation()},
            .finish = FinishReason::kError,
            .error = status};
        Add({&refused});
      }
    } else if (message_.has_cancel()) {
      api_.engine_->Cancel({id_, message_.cancel().request_id(), message_.cancel().generation()});
    } else if (message_.has_beat()) {
      AnswerBeat(message_.beat());
    }
    StartRead(&message_);
  }
  void OnWriteDone(bool ok) override {
    const MutexLock lock(mutex_);
    writing_ = false;
    if (ok) WriteNextLocked();
  }
  void OnCancel() override { Close(grpc::Status::CANCELLED); }
  void OnDone() override { api_.OnGone(id_); }  // may destroy this

 private:
  void CloseLocked(const grpc::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_) return;
    finished_ = true;
    Finish(status);
  }
  // What gathered while the last message was under way goes out as one.
  void WriteNextLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_ || pending_.ByteSizeLong() == 0) return;
    out_.Clear();
    out_.Swap(&pending_);
    writing_ = true;
    StartWrite(&out_);
  }

  AttentionApi& api_;
  const uint64_t id_;
  GatewayMessage message_;  // being read
  Mutex mutex_;
  AttentionMessage out_ ABSL_GUARDED_BY(mutex_), pending_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

grpc::ServerBidiReactor<GatewayMessage, AttentionMessage>* AttentionApi::Session(
    grpc::CallbackServerContext*) {
  std::shared_ptr<SessionStream> stream;
  bool refused = false;
  {
    const MutexLock lock(mutex_);
    const uint64_t id = next_session_++;
    stream = std::make_shared<SessionStream>(*this, id);
    sessions_[id] = stream;
    refused = stop_;
    // Under the lock that Deliver holds while it tells the others of changes: none is missed or told twice.
    std::vector<PrefixChange> all;
    for (const uint64_t name : prefixes_) all.push_back({name, true});
    if (!refused && !all.empty()) stream->AddPrefixes(all);
  }
  if (refused) {
    stream->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the attention node is stopping"));
  } else {
    stream->Start();
  }
  return stream.get();
}

void AttentionApi::OnGone(uint64_t session) {
  engine_->CancelSession(session);
  std::shared_ptr<SessionStream> last;  // destroyed after the lock is released
  const MutexLock lock(mutex_);
  auto it = sessions_.find(session);
  last = std::move(it->second);
  sessions_.erase(it);
}

void AttentionApi::Deliver(EngineOutput output) {
  if (!output.prefixes.empty()) {
    const MutexLock lock(mutex_);
    for (const PrefixChange& change : output.prefixes) {
      change.gained ? (void)prefixes_.insert(change.name) : (void)prefixes_.erase(change.name);
    }
    for (const auto& [id, stream] : sessions_) stream->AddPrefixes(output.prefixes);
  }
  std::map<uint64_t, std::vector<const RequestEvent*>> by_session;
  for (const RequestEvent& event : output.events) by_session[event.key.session].push_back(&event);
  for (auto& [session, list] : by_session) {
    std::shared_ptr<SessionStream> stream;
    {
      const MutexLock lock(mutex_);
      auto it = sessions_.find(session);
      if (it != sessions_.end()) stream = it->second;
    }
    if (stream != nullptr) stream->Add(std::move(list));
  }
}

void AttentionApi::Shutdown() {
  std::vector<std::shared_ptr<SessionStream>> streams;
  {
    const MutexLock lock(mutex_);
    stop_ = true;
    for (const auto& [id, stream] : sessions_) streams.push_back(stream);
  }
  for (const auto& stream : streams)
    stream->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the attention node is stopping"));
  streams.clear();
  const MutexLock lock(mutex_);
  mutex_.AwaitFor(absl::Seconds(5),
                  [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return sessions_.empty(); });
}

grpc::ServerUnaryReactor* AttentionApi::GetStatus(grpc::CallbackServerContext* context,
                                                  const inference::v1::GetStatusRequest*,
                                                  inference::v1::GetStatusResponse* response) {
  const EngineStatus status = engine_->status();
  response->set_running_sequences(static_cast<uint32_t>(status.running));
  response->set_waiting_sequences(static_cast<uint32_t>(status.waiting));
  response->set_cache_pages_total(static_cast<uint32_t>(status.pages_total));
  response->set_cache_pages_used(static_cast<uint32_t>(status.pages_used));
  response->set_steps(status.steps);
  response->set_preemptions(status.preemptions);
  response->set_redispatches(status.redispatched_rows);
  response->set_prefix_cache_queries(status.reuse_queries);
  response->set_prefix_cache_hits(status.reuse_hits);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace minke::attention
