// What mla_prefill.cc hands to the kernels. For files of this folder only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/mla_prefill.h"

namespace minke::cuda {

inline constexpr int kPrefillTileRows = 128;  // Hopper
inline constexpr int kPrefillPortableTileRows = 64;

struct PrefillParams {
  const uint16_t* q;
  HeadRows k, k_rope, v;
  uint16_t* out;
  float* lse;
  const PrefillSpan* spans;
  int32_t* counters;
  int32_t span_count;
  int32_t tiles;  // all spans, all heads
  int32_t heads;
  float scale_log2;
};

struct PrefillMaps {
  CUtensorMap q, k, k_rope, v;
};

cudaError_t LaunchPrefillSm90(const PrefillParams& params, const PrefillMaps& maps, int blocks, int variant,
                              cudaStream_t stream);
cudaError_t LaunchPrefillPortable(const PrefillParams& params, cudaStream_t stream);

}  // namespace minke::cuda
