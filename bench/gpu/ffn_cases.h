// Grouped SwiGLU of experts, for gpu_bench.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "libs/kernels/cuda/device.h"

namespace minke::bench {

struct FfnRow {
  std::string work;
  double ms = 0, flops = 0;
  double bytes = 0;  // weights of the experts that have rows
  // At most one is set, as in gpu_bench's rows.
  double target_tflops = 0, target_gbps = 0, target_ms = 0;
};

struct FfnCalls {
  std::function<bool(const std::string& work)> wanted;
  std::function<void(const FfnRow& row)> report;
  std::function<void(const std::string& work, const absl::Status& status)> fail;
};

// The whole call is timed, planning and summation included. Weights rotate among sets larger than the L2.
void RunFfnCases(const FfnCalls& calls, bool variants, bool portable, const cuda::Stream& stream);

}  // namespace minke::bench
