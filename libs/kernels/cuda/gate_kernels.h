// What gate.cc hands to the kernel. For files of this folder only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/gate.h"

namespace minke::cuda {

struct GateParams {
  GateArgs args;
  int32_t experts, hidden, k, groups, topk_groups;
  float scale;
  bool normalise;
  int32_t splits;   // blocks that share a tile of rows, each a part of the hidden dimension
  int32_t k_steps;  // of kGateStep columns per split
  float* partials;  // [tiles, splits, tile rows, columns]
  uint32_t* counters;  // [tiles], zero between launches
};

inline constexpr int kGateStep = 64;

// Columns of a tile: the experts, padded.
inline int GateColumns(int experts) { return experts <= 64 ? 64 : experts <= 160 ? 160 : 256; }
// Rows of a tile: 16, 64 or 128 (with at most 160 columns).
cudaError_t LaunchGate(const GateParams& params, int tile_rows, cudaStream_t stream);

}  // namespace minke::cuda
