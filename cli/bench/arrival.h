// When the requests of an open loop arrive.
#pragma once

#include <chrono>
#include <cstdint>

#include "cli/bench/random.h"

namespace minke::cli::bench {

enum class Arrival {
  kPoisson,  // independent of each other, as from many users: gaps are exponential
  kUniform,  // evenly spaced
};

// Thread-compatible.
class ArrivalProcess {
 public:
  // REQUIRES: rate_per_s > 0.
  ArrivalProcess(Arrival arrival, double rate_per_s, uint64_t seed)
      : arrival_(arrival), rate_per_s_(rate_per_s), random_(seed, Draw::kArrival, 0) {}

  // Of the next request, counted from the run's begin; never decreases. The first of a uniform process is 0.
  std::chrono::nanoseconds Next();

 private:
  const Arrival arrival_;
  const double rate_per_s_;
  Random random_;
  int64_t count_ = 0;
  double mean_gaps_ = 0;  // time so far in units of the mean gap
};

}  // namespace minke::cli::bench
