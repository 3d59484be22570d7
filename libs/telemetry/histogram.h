// A distribution that any number of threads add to: relaxed atomics, no lock and no allocation after
// construction.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace minke::telemetry {

struct HistogramSnapshot {
  std::vector<double> bounds;    // upper ends of the buckets, inclusive, ascending; the last bucket is +Inf
  std::vector<uint64_t> counts;  // of each bucket, one more than bounds
  double sum = 0;
  uint64_t count() const;
};

// Thread-safe. A snapshot taken while others observe may miss a part of what they are adding, never more.
class Histogram {
 public:
  // `bounds`: not empty, ascending.
  explicit Histogram(std::vector<double> bounds);
  // `times` observations of one value. Not a number: none.
  void Observe(double value, uint64_t times = 1);
  HistogramSnapshot Snapshot() const;

 private:
  const std::vector<double> bounds_;
  const std::unique_ptr<std::atomic<uint64_t>[]> counts_;
  std::atomic<double> sum_{0};
};

// Seconds from 100 µs to 10 s: what happens inside a step.
std::vector<double> StepSecondsBuckets();

}  // namespace minke::telemetry
