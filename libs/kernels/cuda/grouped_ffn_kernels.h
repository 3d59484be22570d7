// What grouped_ffn.cc hands to the kernels, and how weights lie in memory. For files of this folder only.
//
// A matrix of [rows, columns] is cut into units of 128 rows and blocks of 64 columns; expert, unit, block is
// the order. Gate and up share units: rows 16 s ... + 7 of a unit are gate rows 8 s ... of the unit's 64, the
// 8 after them the same rows of up, so that a thread of a matrix product has both for one column of the
// result.
//   bf16: a unit's block is 128 rows of 128 bytes, the 16-byte piece c of row r at place c ^ (r & 7): what
//   the 128-byte
//         swizzle makes of it, 16 KiB.
//   fp8:  in the order in which the threads of a warpgroup hold the left operand of 64 x 16 products
//   (FragmentBytes),
//         8 KiB, then 16 bytes: the factors of gate and up rows, each two times in bf16 and multiplied by
//         2^120, then 112 bytes that are not read: blocks begin on lines of 128 bytes, or the copies would be
//         slower.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/grouped_ffn.h"

namespace minke::cuda {

inline constexpr int kFfnUnitRows = 128, kFfnBlockColumns = 64;
inline constexpr int kFfnBF16Bytes = kFfnUnitRows * kFfnBlockColumns * 2;
inline constexpr int kFfnFP8Bytes = kFfnUnitRows * kFfnBlockColumns + 128,
                     kFfnFP8UsedBytes = kFfnFP8Bytes - 112;
static_assert(kFfnFP8Bytes % 128 == 0);

// Sizes of a shape in units and blocks.
struct FfnUnits {
  int32_t blocks1, units1;  // gate and up: columns of hidden, rows of inner (64 to a unit)
  int32_t blocks2, units2;  // down: columns of inner, rows of hidden
};

inline FfnUnits UnitsOf(const GroupedFfnShape& shape) {
  const int32_t inner = (shape.inner + 63) / 64;
  return {(shape.hidden + 63) / 64, inner, inner, (shape.hidden + 127) / 128};
}

inline constexpr int kFfnPortableTileRows = 64;  // pairs
// Pairs, Hopper: of one block, two of which share weights. fp8 weights pass through registers, which leaves
// room for half.
constexpr int FfnTileRows(FfnFormat format) { return format == FfnFormat::kFP8 ? 64 : 128; }

// Where the pairs of an expert and its work begin. One more entry than experts.
struct alignas(16) FfnExpert {
  int32_t row;             // first pair
  int32_t tiles;           // portable: tiles of pairs before
  int32_t items1, items2;  // Hopper: items of the gate/up and the down product before
};

inline constexpr int kFfnPlanBlocksMax = 64,
                     kFfnPlanSlots = 4096;  // slots that a planning block takes at least

// Made by the planning kernel.
struct GroupedFfnTables {
  FfnExpert* experts;     // [experts + 1]
  int32_t* done;          // [experts] Hopper: arrivals of finished gate/up items
  int32_t* counters;      // [0] next item, [1] units that a block takes where the pairs fill one tile: 1 or 2
  int32_t* pair_source;   // [pairs] row of x
  int32_t* position;      // [outputs, slots] pair of a slot; < 0: none
  int32_t* block_counts;  // [kFfnPlanBlocksMax, experts] pairs that each planning block finds, where there is
                          // more than one
};

struct FfnPlanParams {
  GroupedFfnTables tables;
  const int32_t* outputs_used;
  const int32_t* source;
  const int32_t* expert_of;  // [outputs, slots]
  int32_t experts, outputs, slots;
  FfnUnits units;
  int32_t block_slots;  // of a planning block
  int32_t tile_rows;    // Hopper: FfnTileRows
  int32_t clusters;     // Hopper
  int32_t solo_units;   // 0: by the amount of work
};

struct FfnParams {
  GroupedFfnTables tables;
  const uint16_t* x;
  const uint8_t* gate_up;
  const uint8_t* down;
  // [pairs, 64 blocks2]; Hopper: of each tile of pairs, block after block of [rows, 64], pieces swapped as
  // above.
  uint16_t* inner;
  uint16_t* pairs;                 // [pairs, hidden]
  const int32_t* expert_of;        // [slots]
  int32_t experts, hidden, slots;  // slots of all outputs
  FfnUnits units;
};

struct FfnReduceParams {
  const int32_t* position;
  const int32_t* outputs_used;
  const float* slot_weights;
  const uint16_t* pairs;
  const uint8_t* inner;
  uint16_t* partial;
  const int32_t* partial_rows;  // null: output i has row i
  uint8_t* finite;
  float* x_residual;
  int32_t outputs, slots, hidden;
  int32_t inner_lines;  // lines of 128 bytes of a pair in `inner`
};

struct FfnPackParams {
  const uint16_t* first;   // gate, or down
  const uint16_t* second;  // up, or null
  uint8_t* to;             // the expert's units
  int32_t rows, columns;   // of each matrix
  int32_t units, blocks;
  FfnFormat format;
};

cudaError_t LaunchFfnPack(const FfnPackParams& params, cudaStream_t stream);
// chained: launched so that it may start before the kernel in front of it has ended, which it waits for
// (sm_90).
cudaError_t LaunchFfnPlan(const FfnPlanParams& params, bool chained, cudaStream_t stream);
cudaError_t LaunchFfnReduce(const FfnReduceParams& params, bool chained, cudaStream_t stream);
cudaError_t LaunchFfnPortable(const FfnParams& params, FfnFormat format, int multiprocessors,
                              cudaStream_t stream);
cudaError_t LaunchFfnSm90(const FfnParams& params, FfnFormat format, int multiprocessors,
                          cudaStream_t stream);

}  // namespace minke::cuda
