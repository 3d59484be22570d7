// What grouped_ffn.cc hands to the kernels, and how weights lie in memory. For files of this folder only.
//
// A matrix of [rows, columns] is cut into units of 128 rows and blocks of 128 bytes of columns (64 in bf16,
// 128 in e4m3); expert, unit, block is the order. Gate and up share units: rows 16 s ... + 7 of a unit are
// gate rows 8 s ... of the unit's 64, the 8 after them the same rows of up, so that a thread of a matrix
// product has both for one column of the result. A unit's block is 128 rows of 128 bytes, the 16-byte piece c
// of row r at place c ^ (r & 7): what the 128-byte swizzle makes of it, 16 KiB. In e4m3 16 bytes follow, the
// scales of gate and up rows in f32 (of down: twice the same), then 112 that are not read: blocks begin on
// lines of 128 bytes, or the copies would be slower.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/grouped_ffn.h"

namespace minke::cuda {

inline constexpr int kFfnUnitRows = 128;
inline constexpr int kFfnWeightBytes = kFfnUnitRows * 128;  // of a unit's block
inline constexpr int kFfnScaleBytes = 16;
constexpr int FfnBlockBytes(FfnFormat format) {
  return kFfnWeightBytes + (format == FfnFormat::kFP8 ? 128 : 0);
}
constexpr int FfnBlockColumns(FfnFormat format) { return format == FfnFormat::kFP8 ? 128 : 64; }
// For device code, which may not call functions of the host.
template <FfnFormat kFormat>
inline constexpr int kFfnBlockBytes = FfnBlockBytes(kFormat);
template <FfnFormat kFormat>
inline constexpr int kFfnBlockColumns = FfnBlockColumns(kFormat);

// Sizes of a shape in units and blocks.
struct FfnUnits {
  int32_t blocks1, units1;  // gate and up: columns of hidden, rows of inner (64 to a unit)
  int32_t blocks2, units2;  // down: columns of inner, rows of hidden
};

inline FfnUnits UnitsOf(const GroupedFfnShape& shape, FfnFormat format) {
  const int32_t columns = FfnBlockColumns(format);
  return {(shape.hidden + columns - 1) / columns, (shape.inner + 63) / 64,
          (shape.inner + columns - 1) / columns, (shape.hidden + 127) / 128};
}

inline constexpr int kFfnPortableTileRows = 64;  // pairs
// Pairs, Hopper: of one block, two of which share weights. A product has 128 columns; with e4m3 weights a
// pair takes two.
constexpr int FfnTileRows(FfnFormat format) { return format == FfnFormat::kFP8 ? 64 : 128; }

// Hopper, with e4m3 weights: activations travel as two e4m3 parts each (grouped_ffn_split.cuh). Both
// products' right sides are rows of 128 bytes, groups of 16: eight pairs' first parts, then their second
// ones.
//   x:     [outputs, 2, 128 blocks1] bytes, and a scale per output.
//   inner: of a tile of pairs, their number rounded up to a multiple of 8, block after block: rows of 128
//   bytes
//          in the order above, pieces swapped as of weights; then scales [2, pairs], of 64 columns each. An
//          expert's pairs begin at a multiple of 8.
constexpr int64_t kFfnSplitPairBytes = 2 * 128 + 2 * 4;  // of a pair in one block of `inner`

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
  int32_t* pair_source;   // [pairs] row of x, or of its parts
  int32_t* position;      // [outputs, slots] pair of a slot; < 0: none
  int32_t* block_counts;  // [kFfnPlanBlocksMax, experts] pairs that each planning block finds, where there is
                          // more than one
};

// Hopper, with e4m3 weights: the outputs' rows of x in two parts.
struct FfnSplitParams {
  const uint16_t* x;
  const int32_t* source;
  uint8_t* parts;  // [outputs, 2, 128 blocks]; null: nothing is to be split
  float* scales;   // [outputs]
  int32_t hidden, blocks;
};

struct FfnPlanParams {
  GroupedFfnTables tables;
  const int32_t* outputs_used;
  const int32_t* source;
  const int32_t* expert_of;  // [outputs, slots]
  int32_t experts, outputs, slots;
  FfnUnits units;
  int32_t block_slots;  // of a planning block
  int32_t blocks;       // that plan; set by LaunchFfnPlan
  int32_t tile_rows;    // Hopper: FfnTileRows
  int32_t clusters;     // Hopper
  int32_t solo_units;   // 0: by the amount of work
  FfnSplitParams split;
};

struct FfnParams {
  GroupedFfnTables tables;
  const uint16_t* x;
  const uint8_t* parts;  // instead of x, as are its scales
  const float* part_scales;
  const uint8_t* gate_up;
  const uint8_t* down;
  // bf16 [pairs, columns of blocks2]; Hopper: of each tile of pairs, block after block of [rows, 64], pieces
  // swapped as above, or in two parts.
  uint8_t* inner;
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
  const FfnExpert* experts;
  uint16_t* partial;
  const int32_t* partial_rows;  // null: output i has row i
  uint8_t* finite;
  float* x_residual;
  int32_t outputs, slots, hidden;
  int32_t expert_count;
  int32_t inner_pair_bytes,
      inner_pairs_more;  // size of `inner`: bytes of a pair, pairs that it has more room for
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
