// Counters into rates, once a second: what members report of how busy they are. Thread-compatible.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace minke::cluster {

class RateMeter {
 public:
  // Whether a second has passed since the last round; then a new one begins, over the time since.
  bool Begin(absl::Time now) {
    if (now - begun_ < absl::Seconds(1)) return false;
    seconds_ = begun_ == absl::InfinitePast() ? 0 : absl::ToDoubleSeconds(now - begun_);
    begun_ = now;
    next_ = 0;
    return true;
  }
  // Growth per second of a counter since the last round; 0 in the first one. Every round names the same
  // counters in the same order.
  float PerSecond(uint64_t total) {
    if (next_ == totals_.size()) totals_.push_back(total);
    const uint64_t before = totals_[next_];
    totals_[next_++] = total;
    return seconds_ <= 0 || total < before
               ? 0.f
               : static_cast<float>(static_cast<double>(total - before) / seconds_);
  }

 private:
  absl::Time begun_ = absl::InfinitePast();
  double seconds_ = 0;
  size_t next_ = 0;
  std::vector<uint64_t> totals_;
};

}  // namespace minke::cluster
