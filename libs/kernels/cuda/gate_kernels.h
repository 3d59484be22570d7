// What gate.cc hands to the kernel. For files of this folder only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/gate.h"

namespace minke::cuda {

struct GateParams {
  GateArgs args;
  int32_t experts, hidden, k, groups, topk_groups;
  float scale;
  bool normalise;
  int32_t splits;     // blocks that share a tile of rows, each a part of the hidden dimension
  int32_t k_steps;    // of kGateStep columns per split
  float* partials;    // [tiles, splits, tile rows, columns]
  int32_t tile_rows;  // 16, 64 or 128 (portable: with at most 160 columns)
};

inline constexpr int kGateStep = 64;

// Columns of a tile: the experts, padded.
inline int GateColumns(int experts) { return experts <= 64 ? 64 : experts <= 160 ? 160 : 256; }
// The logits' parts, then the choice. `overlapped`: the second kernel is set up while the first runs (sm_90).
cudaError_t LaunchLogitsPortable(const GateParams& params, cudaStream_t stream);
// Tiles of 64 or 128 rows. Maps of x and w with boxes of 64 columns, tile_rows and GateColumns rows.
cudaError_t LaunchLogitsSm90(const GateParams& params, const CUtensorMap& x_map, const CUtensorMap& w_map,
                             cudaStream_t stream);
cudaError_t LaunchChoose(const GateParams& params, bool overlapped, cudaStream_t stream);

}  // namespace minke::cuda
