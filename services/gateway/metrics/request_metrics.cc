#include "services/gateway/metrics/request_metrics.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace minke::gateway {
namespace {

using Buckets = std::vector<double>;
using Seconds = std::chrono::duration<double>;

// As vLLM has them, so that its dashboards and alerts mean the same here.
Buckets FirstTokenBuckets() {
  return {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
          1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
}
Buckets TokenLatencyBuckets() {
  return {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
}
Buckets RequestLatencyBuckets() {
  return {0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
}
// 1, 2, 5, 10, 20, 50 ... up to the largest that is not above `limit`.
Buckets TokenCountBuckets(int64_t limit) {
  Buckets bounds = {1};
  for (int64_t power = 1; power <= limit; power *= 10) {
    for (const int64_t bound : {power, 2 * power, 5 * power}) {
      if (bound > 1 && bound <= limit) bounds.push_back(static_cast<double>(bound));
    }
  }
  return bounds;
}

const char* ToString(SequenceEnd end) {
  switch (end) {  // no default: a new end must fail the build
    case SequenceEnd::kStop:
      return "stop";
    case SequenceEnd::kLength:
      return "length";
    case SequenceEnd::kAbort:
      return "abort";
    case SequenceEnd::kError:
      return "error";
  }
  return "unknown";
}

}  // namespace

RequestMetrics::RequestMetrics(int64_t context_length)
    : time_to_first_token(FirstTokenBuckets()),
      inter_token_latency(TokenLatencyBuckets()),
      time_per_output_token(TokenLatencyBuckets()),
      e2e_latency(RequestLatencyBuckets()),
      queue_time(RequestLatencyBuckets()),
      prefill_time(RequestLatencyBuckets()),
      decode_time(RequestLatencyBuckets()),
      inference_time(RequestLatencyBuckets()),
      prompt_tokens(TokenCountBuckets(context_length)),
      generation_tokens(TokenCountBuckets(context_length)),
      max_tokens(TokenCountBuckets(context_length)),
      n({1, 2, 5, 10, 20}) {}

void RequestMetrics::Collect(const std::string& model_name, telemetry::Page& page) const {
  const auto histogram = [&](const char* name, const char* help, const telemetry::Histogram& values) {
    page.Add(name, help, values.Snapshot(), {{"model_name", model_name}});
  };
  histogram("minke:time_to_first_token_seconds", "From admission to the first token", time_to_first_token);
  histogram("minke:inter_token_latency_seconds", "Between two tokens of a sequence", inter_token_latency);
  histogram("minke:request_time_per_output_token_seconds", "Mean of a sequence's times between two tokens",
            time_per_output_token);
  histogram("minke:e2e_request_latency_seconds", "From admission to the end of a sequence", e2e_latency);
  histogram("minke:request_queue_time_seconds", "In an attention node's admission queue", queue_time);
  histogram("minke:request_prefill_time_seconds", "From the end of the queue to the first token",
            prefill_time);
  histogram("minke:request_decode_time_seconds", "From the first to the last token", decode_time);
  histogram("minke:request_inference_time_seconds", "From the end of the queue to the last token",
            inference_time);
  histogram("minke:request_prompt_tokens", "Prompt tokens of a sequence", prompt_tokens);
  histogram("minke:request_generation_tokens", "Generated tokens of a sequence", generation_tokens);
  histogram("minke:request_params_max_tokens", "max_tokens of requests", max_tokens);
  histogram("minke:request_params_n", "Choices asked for by requests", n);
  for (int end = 0; end < kSequenceEnds; ++end) {
    page.Counter("minke:request_success_total", "Sequences that have ended",
                 static_cast<double>(ended[end].load(std::memory_order_relaxed)),
                 {{"model_name", model_name}, {"finished_reason", ToString(static_cast<SequenceEnd>(end))}});
  }
}

SequenceTimer::SequenceTimer(SequenceTimer&& other) noexcept
    : metrics_(std::exchange(other.metrics_, nullptr)),
      arrival_(other.arrival_),
      first_token_(other.first_token_),
      last_token_(other.last_token_),
      queue_time_(other.queue_time_),
      prompt_tokens_(other.prompt_tokens_),
      tokens_(other.tokens_) {}

void SequenceTimer::OnEvent(Clock::time_point received, size_t tokens, std::chrono::microseconds queue_time) {
  if (metrics_ == nullptr) return;
  queue_time_ += queue_time;
  if (tokens == 0) return;
  if (tokens_ == 0) {
    first_token_ = received;
    metrics_->time_to_first_token.Observe(Seconds(received - arrival_).count());
  } else {
    metrics_->inter_token_latency.Observe(Seconds(received - last_token_).count());
  }
  last_token_ = received;
  tokens_ += tokens;
}

void SequenceTimer::End(FinishReason reason) {
  switch (reason) {  // no default: a new reason must be named
    case FinishReason::kNone:
      return;
    case FinishReason::kStop:
      return End(SequenceEnd::kStop);
    case FinishReason::kLength:
      return End(SequenceEnd::kLength);
    case FinishReason::kError:
      return End(SequenceEnd::kError);
  }
}

void SequenceTimer::End(SequenceEnd end) {
  RequestMetrics* const metrics = std::exchange(metrics_, nullptr);
  if (metrics == nullptr) return;
  metrics->ended[static_cast<int>(end)].fetch_add(1, std::memory_order_relaxed);
  metrics->e2e_latency.Observe(Seconds(Clock::now() - arrival_).count());
  metrics->queue_time.Observe(Seconds(queue_time_).count());
  metrics->prompt_tokens.Observe(static_cast<double>(prompt_tokens_));
  metrics->generation_tokens.Observe(static_cast<double>(tokens_));
  if (tokens_ == 0) return;
  const double decode = Seconds(last_token_ - first_token_).count();
  const double prefill = std::max(0.0, Seconds(first_token_ - arrival_ - queue_time_).count());
  metrics->prefill_time.Observe(prefill);
  metrics->decode_time.Observe(decode);
  metrics->inference_time.Observe(prefill + decode);
  if (tokens_ > 1) metrics->time_per_output_token.Observe(decode / static_cast<double>(tokens_ - 1));
}

void ResponseCounts::Count(bool generates, int status) {
  if (status < 0 || status > kStatusMax) return;
  counts_[generates ? 1 : 0][status].fetch_add(1, std::memory_order_relaxed);
}

void ResponseCounts::Collect(telemetry::Page& page) const {
  for (int generates = 0; generates < 2; ++generates) {
    for (int status = 0; status <= kStatusMax; ++status) {
      const uint64_t count = counts_[generates][status].load(std::memory_order_relaxed);
      // Those that rates are made of are there before the first one comes.
      const bool always = status == 200 || (generates == 1 && (status == 429 || status == 503));
      if (count == 0 && !always) continue;
      page.Counter("minke:http_responses_total", "Answers of the HTTP API", static_cast<double>(count),
                   {{"endpoint", generates == 1 ? "generate" : "other"}, {"code", std::to_string(status)}});
    }
  }
}

}  // namespace minke::gateway
