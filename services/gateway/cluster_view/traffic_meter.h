// How fast this gateway's sequences go: tokens per second, time to the first token, time per token; over the
// last minute as a whole, and second by second for charts. A fixed amount of memory. Thread-safe.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace minke::gateway {

// A count per range of durations, each 12 % wider than the one before; 0.1 ms to 2,700 s, what is beyond
// counts at the ends.
class DurationHistogram {
 public:
  static constexpr int kBins = 150;
  void Add(std::chrono::nanoseconds time, uint32_t count);
  void Add(const DurationHistogram& other);
  // In ms, off by 6 % at most; none of an empty histogram. `part`: 0.5 for the median.
  std::optional<double> QuantileMs(double part) const;

 private:
  std::array<uint32_t, kBins> counts_{};
  uint64_t total_ = 0;
};

class TrafficMeter {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kSeriesSeconds = 120;
  static constexpr int kWindowSeconds = 60;

  struct Second {  // of whole seconds that have passed
    uint32_t tokens = 0;
    std::optional<double> first_token_ms, token_ms;  // medians
  };
  struct Latency {
    std::optional<double> p50_ms, p95_ms;
  };
  struct Summary {
    // Of the last whole minute, or of what has passed since the start.
    double tokens_per_s = 0, prompt_tokens_per_s = 0, sequences_per_s = 0;
    uint64_t failed = 0;
    Latency first_token, token;
    std::vector<Second> series;  // oldest first, kSeriesSeconds of them
  };

  explicit TrafficMeter(Clock::time_point now) : start_(now) {}

  void OnStart(Clock::time_point now, size_t prompt_tokens);
  // `tokens` of one sequence at once. `since_last`: since its last ones, or with `first` since its start.
  void OnTokens(Clock::time_point now, size_t tokens, std::chrono::nanoseconds since_last, bool first);
  void OnFailure(Clock::time_point now);
  Summary Summarise(Clock::time_point now) const;

 private:
  struct Bucket {
    int64_t second = -1;  // since start_; another one: stale
    uint32_t tokens = 0, prompt_tokens = 0, sequences = 0, failed = 0;
    DurationHistogram first_token, token;
  };
  int64_t SecondOf(Clock::time_point now) const {
    return std::chrono::duration_cast<std::chrono::seconds>(now - start_).count();
  }
  Bucket& NowLocked(Clock::time_point now);
  const Bucket* FindLocked(int64_t second) const;

  const Clock::time_point start_;
  mutable std::mutex mutex_;
  std::array<Bucket, kSeriesSeconds + 1> buckets_;  // guarded by mutex_; by second, and the one that runs
};

}  // namespace minke::gateway
