// Timing on the device: every run between two events, medians, inputs that rotate through more than the L2
// holds.
#pragma once

#include <algorithm>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/kernels/cuda/device.h"

namespace minke::bench {

inline constexpr int kWarmups = 5, kRuns = 20;

// The number of input sets of this many bytes, so that none is left in the cache when its turn comes again.
inline int Sets(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>((int64_t{400} << 20) / bytes + 1, 2, 40));
}

// Median milliseconds of run(set); `run` returns a status.
template <class Run>
absl::StatusOr<double> MedianMilliseconds(int sets, const cuda::Stream& stream, Run run) {
  std::vector<cuda::Event> events;
  for (int i = 0; i < 2 * (kWarmups + kRuns); ++i) {
    absl::StatusOr<cuda::Event> event = cuda::Event::Create();
    if (!event.ok()) return event.status();
    events.push_back(*std::move(event));
  }
  for (int i = 0; i < kWarmups + kRuns; ++i) {
    if (absl::Status s = events[2 * i].Record(stream); !s.ok()) return s;
    if (absl::Status s = run(i % sets); !s.ok()) return s;
    if (absl::Status s = events[2 * i + 1].Record(stream); !s.ok()) return s;
  }
  if (absl::Status s = stream.Synchronize(); !s.ok()) return s;
  std::vector<double> times;
  for (int i = kWarmups; i < kWarmups + kRuns; ++i) {
    absl::StatusOr<float> ms = cuda::Event::Milliseconds(events[2 * i], events[2 * i + 1]);
    if (!ms.ok()) return ms.status();
    times.push_back(*ms);
  }
  std::sort(times.begin(), times.end());
  return (times[kRuns / 2 - 1] + times[kRuns / 2]) / 2;
}

}  // namespace minke::bench
