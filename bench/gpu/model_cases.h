// The gate, sampling, a whole V2-Lite decoding on one GPU, and the steps of an attention node and an expert
// server of a V2 cluster. Random weights, made on the device.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "libs/kernels/cuda/device.h"

namespace minke::bench {

struct ModelRow {
  std::string work;
  double ms = 0, flops = 0, bytes = 0;
  double target_ms = 0;  // 0: none
};

struct ModelCalls {
  std::function<bool(const std::string&)> wanted;
  std::function<void(const ModelRow&)> report;
  std::function<void(const std::string&, const absl::Status&)> fail;
  double copy_gbps = 0;  // what this device reaches
};

void RunModelCases(const ModelCalls& calls, const cuda::Stream& stream);

}  // namespace minke::bench
