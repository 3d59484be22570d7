#include "cli/bench/arrival.h"

namespace minke::cli::bench {

std::chrono::nanoseconds ArrivalProcess::Next() {
  switch (arrival_) {
    case Arrival::kPoisson:
      mean_gaps_ += random_.Exponential();
      break;
    case Arrival::kUniform:
      mean_gaps_ = static_cast<double>(count_++);  // not a sum of gaps: no error adds up
      break;
  }
  return std::chrono::nanoseconds(static_cast<int64_t>(mean_gaps_ / rate_per_s_ * 1e9));
}

}  // namespace minke::cli::bench
