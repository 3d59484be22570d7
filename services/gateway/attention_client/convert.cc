#include "services/gateway/attention_client/convert.h"

#include <utility>

namespace minke::gateway {
namespace {

namespace v1 = inference::v1;

TokenLogprob FromProto(const v1::TokenLogprobs& proto) {
  TokenLogprob logprob{proto.token_id(), proto.logprob(), {}};
  const int count = std::min(proto.top_token_ids_size(), proto.top_logprobs_size());
  logprob.top.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) logprob.top.emplace_back(proto.top_token_ids(i), proto.top_logprobs(i));
  return logprob;
}

FinishReason FromProto(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_NONE:
      return FinishReason::kNone;
    case v1::FINISH_REASON_STOP:
      return FinishReason::kStop;
    case v1::FINISH_REASON_LENGTH:
      return FinishReason::kLength;
    default:
      return FinishReason::kError;  // ERROR, and what a newer node may say
  }
}

PhaseTimes FromProto(const v1::PhaseTimes& proto) {
  const auto us = [](uint64_t value) { return std::chrono::microseconds(value); };
  return {proto.steps(),
          {{"plan", us(proto.plan_us())},
           {"attention", us(proto.attention_us())},
           {"dispatch", us(proto.dispatch_us())},
           {"shared_experts", us(proto.shared_experts_us())},
           {"wait_for_experts", us(proto.wait_us())},
           {"combine", us(proto.combine_us())},
           {"head", us(proto.head_us())},
           {"sampling", us(proto.sampling_us())},
           {"output", us(proto.output_us())}}};
}

}  // namespace

void ToProto(const Sampling& sampling, v1::SamplingParams* proto) {
  proto->set_temperature(sampling.temperature);
  proto->set_top_p(sampling.top_p);
  proto->set_top_k(sampling.top_k);
  proto->set_min_p(sampling.min_p);
  proto->set_presence_penalty(sampling.presence_penalty);
  proto->set_frequency_penalty(sampling.frequency_penalty);
  proto->set_repetition_penalty(sampling.repetition_penalty);
  proto->set_seed(sampling.seed);
  for (const auto& [id, bias] : sampling.logit_bias) {
    v1::LogitBias* entry = proto->add_logit_bias();
    entry->set_token_id(id);
    entry->set_bias(bias);
  }
  proto->mutable_stop_token_ids()->Assign(sampling.stop_token_ids.begin(), sampling.stop_token_ids.end());
  proto->set_max_tokens(sampling.max_tokens);
  proto->set_want_logprobs(sampling.logprobs.has_value());
  proto->set_top_logprobs(sampling.logprobs.value_or(0));
  proto->set_want_prompt_logprobs(sampling.prompt_logprobs);
  proto->set_top_prompt_logprobs(sampling.prompt_logprobs ? sampling.logprobs.value_or(0) : 0);
}

SequenceEvent FromProto(v1::Event* event) {
  SequenceEvent result;
  result.token_ids.assign(event->token_ids().begin(), event->token_ids().end());
  result.logprobs.reserve(static_cast<size_t>(event->logprobs_size()));
  for (const auto& one : event->logprobs()) result.logprobs.push_back(FromProto(one));
  result.prompt_logprobs.reserve(static_cast<size_t>(event->prompt_logprobs_size()));
  for (const auto& one : event->prompt_logprobs()) result.prompt_logprobs.push_back(FromProto(one));
  result.finish = FromProto(event->finish_reason());
  result.cached_prompt_tokens = event->cached_prompt_tokens();
  result.queue_time = std::chrono::microseconds(event->queue_us());
  if (event->has_prefill_times() || event->has_decode_times())
    result.times = {FromProto(event->prefill_times()), FromProto(event->decode_times())};
  if (result.finish == FinishReason::kError) {
    // grpc::StatusCode and absl::StatusCode have the same numbers; OK would not be an error.
    const auto code = static_cast<absl::StatusCode>(event->error().code());
    result.error = absl::Status(code == absl::StatusCode::kOk ? absl::StatusCode::kInternal : code,
                                event->error().message());
  }
  return result;
}

void ToProto(const TokenLogprob& logprob, v1::TokenLogprobs* proto) {
  proto->set_token_id(logprob.token_id);
  proto->set_logprob(logprob.logprob);
  for (const auto& [id, value] : logprob.top) {
    proto->add_top_token_ids(id);
    proto->add_top_logprobs(value);
  }
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {  // no default: a new reason must be named
    case FinishReason::kNone:
      return v1::FINISH_REASON_NONE;
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kError:
      return v1::FINISH_REASON_ERROR;
  }
  return v1::FINISH_REASON_ERROR;
}

}  // namespace minke::gateway
