#include "services/attention/engine/sequence_trace.h"

#include <utility>

#include "libs/base/strings.h"

namespace minke::attention {
namespace {

void AddPhases(const std::array<double, kStepPhases>& seconds, tracing::Attributes* to) {
  for (int i = 0; i < kStepPhases; ++i) {
    if (seconds[i] <= 0 || i == static_cast<int>(StepPhase::kIdle)) continue;
    to->emplace_back(StrCat("minke.seconds.", ToString(static_cast<StepPhase>(i))), seconds[i]);
  }
}

}  // namespace

SequenceTrace::SequenceTrace(tracing::Tracer* tracer, const tracing::SpanContext& parent,
                             std::string request_name, tracing::Time received)
    : tracer_(tracer), parent_(parent), request_name_(std::move(request_name)), received_(received) {}

SequenceTrace::~SequenceTrace() {
  const tracing::Time now = tracing::Now();
  if (!admitted_) admitted_at_ = now;
  if (!generated_) first_token_at_ = now;
  tracing::Span queue = Child("queue", tracing::NewSpanId(), received_, admitted_at_);
  if (!admitted_ && !error_.empty()) {
    queue.failed = true;
    queue.error = error_;
  }
  tracer_->Record(std::move(queue));
  if (!admitted_) return;
  tracing::Span prefill = Part("prefill", prefill_span_, admitted_at_, first_token_at_, prefill_);
  prefill.attributes.emplace_back("minke.prompt_tokens", prompt_tokens_);
  prefill.attributes.emplace_back("minke.cached_tokens", cached_tokens_);
  if (generated_) {
    tracing::Span decode = Part("decode", decode_span_, first_token_at_, now, decode_);
    decode.attributes.emplace_back("minke.tokens", tokens_);
    tracer_->Record(std::move(decode));
  } else if (!error_.empty()) {
    prefill.failed = true;
    prefill.error = error_;
  }
  tracer_->Record(std::move(prefill));
}

void SequenceTrace::Admitted(tracing::Time now, int64_t prompt_tokens, int64_t cached_tokens) {
  if (std::exchange(admitted_, true)) return;
  admitted_at_ = now;
  prompt_tokens_ = prompt_tokens;
  cached_tokens_ = cached_tokens;
}

void SequenceTrace::StepDone(tracing::Time now, bool decode, int64_t tokens,
                             const std::array<double, kStepPhases>& step) {
  (decode ? decode_ : prefill_).Add(step);
  tokens_ += tokens;
  if (tokens > 0 && !std::exchange(generated_, true)) first_token_at_ = now;
  if (step_.id == 0) return;
  step_.end = now;
  AddPhases(step, &step_.attributes);
  tracer_->Record(std::exchange(step_, {}));
}

bool SequenceTrace::WantsStep(bool decode) const {
  return decode ? decode_.steps % kStepsBetween == 0 : prefill_.steps == 0;
}

tracing::SpanContext SequenceTrace::BeginStep(tracing::Time now, uint64_t step, int64_t rows,
                                              int64_t sequences, bool decode) {
  step_ = Child("step", tracing::NewSpanId(), now, now);
  step_.parent = decode ? decode_span_ : prefill_span_;
  step_.attributes.emplace_back("minke.step", static_cast<int64_t>(step));
  step_.attributes.emplace_back("minke.rows", rows);
  step_.attributes.emplace_back("minke.sequences", sequences);
  return {parent_.trace, step_.id, true};
}

tracing::Span SequenceTrace::Child(const char* name, tracing::SpanId id, tracing::Time begin,
                                   tracing::Time end) const {
  return {.trace = parent_.trace,
          .id = id,
          .parent = parent_.span,
          .name = name,
          .begin = begin,
          .end = end,
          .attributes = {{"minke.request_id", request_name_}}};
}

tracing::Span SequenceTrace::Part(const char* name, tracing::SpanId id, tracing::Time begin,
                                  tracing::Time end, const PhaseTimes& times) const {
  tracing::Span span = Child(name, id, begin, end);
  span.attributes.emplace_back("minke.steps", static_cast<int64_t>(times.steps));
  AddPhases(times.seconds, &span.attributes);
  return span;
}

}  // namespace minke::attention
