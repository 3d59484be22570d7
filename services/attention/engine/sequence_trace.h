// The spans of one traced request inside an attention node (docs/tracing.md): queue, prefill and decode, and
// of a few of its steps every exchange with the expert pool.
#pragma once

#include <cstdint>
#include <string>

#include "libs/base/ids.h"
#include "libs/tracing/tracer.h"
#include "services/attention/engine/phase_times.h"

namespace minke::attention {

// Engine thread only.
class SequenceTrace {
 public:
  // `tracer` is borrowed. `parent`: sampled. `received`: when the request came to this node.
  SequenceTrace(tracing::Tracer* tracer, const tracing::SpanContext& parent, std::string request_name,
                tracing::Time received);
  SequenceTrace(const SequenceTrace&) = delete;
  SequenceTrace& operator=(const SequenceTrace&) = delete;
  ~SequenceTrace();  // the request ends here: its spans go out

  // Its first rows are about to be computed.
  void Admitted(tracing::Time now, int64_t prompt_tokens, int64_t cached_tokens);
  // A step has computed rows of it; `tokens`: new ones.
  void StepDone(tracing::Time now, bool decode, int64_t tokens, const std::array<double, kStepPhases>& step);
  void Failed(std::string error) { error_ = std::move(error); }

  // Whether the next step shall be traced layer by layer: the first of prefill, the first of decode, and
  // every kStepsBetween-th after it.
  bool WantsStep(bool decode) const;
  // The span of such a step, whose children are the layers'; recorded by StepDone.
  tracing::SpanContext BeginStep(tracing::Time now, uint64_t step, int64_t rows, int64_t sequences,
                                 bool decode);
  tracing::Tracer& tracer() const { return *tracer_; }

  static constexpr uint32_t kStepsBetween = 64;

 private:
  tracing::Span Child(const char* name, tracing::SpanId id, tracing::Time begin, tracing::Time end) const;
  tracing::Span Part(const char* name, tracing::SpanId id, tracing::Time begin, tracing::Time end,
                     const PhaseTimes& times) const;

  tracing::Tracer* const tracer_;
  const tracing::SpanContext parent_;
  const std::string request_name_;
  const tracing::Time received_;
  const tracing::SpanId prefill_span_ = tracing::NewSpanId(), decode_span_ = tracing::NewSpanId();
  bool admitted_ = false, generated_ = false;
  tracing::Time admitted_at_, first_token_at_, last_step_at_;
  int64_t prompt_tokens_ = 0, cached_tokens_ = 0, tokens_ = 0;
  PhaseTimes prefill_, decode_;
  tracing::Span step_;  // id 0: none is under way
  std::string error_;
};

}  // namespace minke::attention
