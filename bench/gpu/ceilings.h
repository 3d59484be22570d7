// What this device can do, by the simplest programs that reach it.
#pragma once

#include "absl/status/statusor.h"
#include "libs/kernels/cuda/device.h"

namespace minke::bench {

absl::StatusOr<double> CopyGBPerSecond(const cuda::Stream& stream);        // bytes read plus bytes written
absl::StatusOr<double> ProductTFlopPerSecond(const cuda::Stream& stream);  // bf16, 8192 cubed, cuBLASLt

}  // namespace minke::bench
