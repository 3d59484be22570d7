// Random contents for benchmarks: zeros would be faster than real data.
#pragma once

#include <cstdint>

#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::bench {

// Normal values of the given deviation; the same for the same seed.
absl::Status FillNormal(bf16* data, int64_t count, uint32_t seed, float deviation,
                        const cuda::Stream& stream);

}  // namespace minke::bench
