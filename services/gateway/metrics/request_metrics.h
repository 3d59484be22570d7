// What operators watch of requests, with the names, meaning and buckets of vLLM's metrics (docs/metrics.md),
// measured here, where a request begins and ends. Counting is relaxed atomics.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "libs/telemetry/histogram.h"
#include "libs/telemetry/page.h"
#include "services/gateway/generation/types.h"

namespace minke::gateway {

// How a sequence ended; kAbort: the client left; kError: its request failed.
enum class SequenceEnd : uint8_t { kStop, kLength, kAbort, kError };
inline constexpr int kSequenceEnds = 4;

// Thread-safe.
class RequestMetrics {
 public:
  // context_length: of the model; buckets of token counts end there.
  explicit RequestMetrics(int64_t context_length);
  void Collect(const std::string& model_name, telemetry::Page& page) const;

  // Seconds.
  telemetry::Histogram time_to_first_token, inter_token_latency, time_per_output_token, e2e_latency;
  telemetry::Histogram queue_time, prefill_time, decode_time, inference_time;
  // Tokens; the request's own parameters.
  telemetry::Histogram prompt_tokens, generation_tokens, max_tokens, n;
  std::array<std::atomic<uint64_t>, kSequenceEnds> ended{};
};

// One sequence from its beginning to its end. Thread-compatible.
class SequenceTimer {
 public:
  using Clock = std::chrono::steady_clock;

  // `metrics` is borrowed. `arrival`: when the request was admitted.
  SequenceTimer(RequestMetrics* metrics, Clock::time_point arrival, size_t prompt_tokens)
      : metrics_(metrics), arrival_(arrival), prompt_tokens_(prompt_tokens) {}
  SequenceTimer(SequenceTimer&& other) noexcept;
  SequenceTimer& operator=(SequenceTimer&&) = delete;
  ~SequenceTimer() { End(SequenceEnd::kAbort); }

  // An event that was received then. `queue_time`: waited in an attention node's admission queue, as it says.
  void OnEvent(Clock::time_point received, size_t tokens, std::chrono::microseconds queue_time);
  // The first call counts; without one the sequence was aborted.
  void End(SequenceEnd end);
  void End(FinishReason reason);  // nothing with kNone

 private:
  RequestMetrics* metrics_;  // null: it has ended
  Clock::time_point arrival_, first_token_{}, last_token_{};
  std::chrono::microseconds queue_time_{0};
  size_t prompt_tokens_;
  uint64_t tokens_ = 0;
};

// Answers by what was asked for and HTTP status. Thread-safe.
class ResponseCounts {
 public:
  void Count(bool generates, int status);
  void Collect(telemetry::Page& page) const;

 private:
  static constexpr int kStatusMax = 599;
  std::array<std::array<std::atomic<uint64_t>, kStatusMax + 1>, 2> counts_{};  // [generates][status]
};

}  // namespace minke::gateway
