// Tensor maps for the bulk tensor copy engine (sm_90). For files of this folder only.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"

namespace minke::cuda {

// A bf16 tensor, innermost dimension first, contiguous there. `strides_bytes` has one entry per further
// dimension (multiples of 16). The box lands in shared memory in rows of 128 bytes (64 columns) under the
// 128-byte swizzle; what lies outside the tensor reads as zero.
absl::StatusOr<CUtensorMap> MakeTensorMap(const void* data, std::span<const uint64_t> dims,
                                          std::span<const uint64_t> strides_bytes,
                                          std::span<const uint32_t> box);

}  // namespace minke::cuda
