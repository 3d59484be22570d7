// Before and after the products: sorts the pairs by expert and shares the work out; adds up the pairs of each output.
#include <cuda_bf16.h>

#include <algorithm>

#include "libs/kernels/cuda/grouped_ffn_kernels.h"
#include "libs/kernels/cuda/grouped_ffn_split.cuh"

namespace minke::cuda {
namespace {

constexpr int kPlanThreads = 1024, kPlanWarps = kPlanThreads / 32;
constexpr int kBatch = 8;

// The kernel launched next may be set up beside this one; it waits for this one's memory.
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void DependentWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ int Ceil(int a, int b) { return (a + b - 1) / b; }

// Hopper's items for an expert of `rows` pairs and `units` units: two blocks share two units of weights where the pairs
// fill more than one tile, and take different units (solo_units each) where they do not.
__device__ __forceinline__ int Items(int rows, int tile_rows, int units, int solo_units) {
  const int pair_groups = (rows + tile_rows - 1) / (2 * tile_rows);
  const bool rest = rows > pair_groups * 2 * tile_rows;
  return pair_groups * Ceil(units, 2) + (rest ? Ceil(units, 2 * solo_units) : 0);
}

__device__ __forceinline__ int WarpSum(int x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
// Of the lanes before this one.
__device__ __forceinline__ int WarpBefore(int x, int lane) {
  int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  return sum - x;
}

// A warp's part of the slots: consecutive, whole batches where that leaves enough of them, so that loads go out together.
struct Range {
  int begin, end;
  int warps;  // of the block that have a part
};
__device__ __forceinline__ Range Part(const FfnPlanParams& p, int warp) {
  const int outputs = p.outputs_used == nullptr ? p.outputs : min(max(*p.outputs_used, 0), p.outputs);
  const int block_begin = min(blockIdx.x * p.block_slots, outputs * p.slots);
  const int slots = min(outputs * p.slots - block_begin, p.block_slots);
  const int each = Ceil(slots, kPlanThreads * kBatch) * 32 * kBatch, begin = min(warp * each, slots);
  return {block_begin + begin, block_begin + min(begin + each, slots), slots == 0 ? 0 : Ceil(slots, each)};
}

// Experts of kBatch x 32 slots; -1 where there is no pair.
__device__ __forceinline__ void LoadBatch(const FfnPlanParams& p, const Range& range, int from, int lane,
                                          int (&expert)[kBatch]) {
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int i = from + j * 32 + lane;
    expert[j] = i < range.end ? p.expert_of[i] : -1;
    if (static_cast<uint32_t>(expert[j]) >= static_cast<uint32_t>(p.experts)) expert[j] = -1;
  }
}

__device__ __forceinline__ void Count(const FfnPlanParams& p, const Range& range, int lane, int* counts) {
  for (int e = lane; e < p.experts; e += 32) counts[e] = 0;
  __syncwarp();
  for (int i = range.begin; i < range.end; i += 32 * kBatch) {
    int expert[kBatch];
    LoadBatch(p, range, i, lane, expert);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (expert[j] >= 0) atomicAdd(&counts[expert[j]], 1);
    }
  }
}

// Where one block is not enough: how many pairs of each expert every block of the planning kernel will find.
__global__ void __launch_bounds__(kPlanThreads) CountKernel(const FfnPlanParams p) {
  __shared__ int counts[kPlanWarps][kGroupedFfnExpertsMax];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LaunchDependents();
  const Range range = Part(p, warp);
  if (warp < range.warps) Count(p, range, lane, counts[warp]);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kPlanThreads) {
    int sum = 0;
    for (int w = 0; w < range.warps; ++w) sum += counts[w][e];
    p.tables.block_counts[blockIdx.x * p.experts + e] = sum;
  }
}

constexpr int kSplitThreads = 128;                          // of a row
constexpr int kSplitRows = kPlanThreads / kSplitThreads;    // of a block
constexpr int kSplitKept = 5;                               // times 8 values a thread: rows of 5,120 stay in registers

// Eight values from `column` on, zeros past the end.
__device__ __forceinline__ uint4 LoadEight(const uint16_t* row, int column, int columns) {
  return column < columns ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ uint32_t Largest(uint32_t largest, const uint4& eight) {
  const uint32_t packed[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) largest = max(largest, max(packed[j] << 16 & 0x7fffffffu, packed[j] & 0x7fff0000u));
  return largest;
}
__device__ __forceinline__ void StoreParts(uint8_t* to, int64_t second, const uint4& eight, float inverse) {
  const uint32_t packed[4] = {eight.x, eight.y, eight.z, eight.w};
  uint32_t a[4], b[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Split(__uint_as_float(packed[j] << 16) * inverse, __uint_as_float(packed[j] & 0xffff0000u) * inverse, a[j], b[j]);
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(a[0] | a[1] << 16, a[2] | a[3] << 16);
  *reinterpret_cast<uint2*>(to + second) = make_uint2(b[0] | b[1] << 16, b[2] | b[3] << 16);
}

// An output's row of x in two parts (grouped_ffn_split.cuh), by the threads of a row.
__device__ __forceinline__ void SplitRow(const FfnPlanParams& p, int block, uint32_t (*largest_of)[kSplitThreads / 32]) {
  const FfnSplitParams& split = p.split;
  const int row = threadIdx.x / kSplitThreads, thread = threadIdx.x % kSplitThreads;
  const int outputs = p.outputs_used == nullptr ? p.outputs : min(max(*p.outputs_used, 0), p.outputs);
  const int output = block * kSplitRows + row;
  const bool here = output < outputs;
  const uint16_t* from = split.x;
  if (here) from += static_cast<int64_t>(split.source == nullptr ? output : split.source[output]) * split.hidden;
  const int columns = here ? split.hidden : 0;
  constexpr int kStep = kSplitThreads * 8, kFar = kSplitKept * kStep;
  uint4 kept[kSplitKept];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSplitKept; ++i) kept[i] = LoadEight(from, i * kStep + thread * 8, columns);
#pragma unroll
  for (int i = 0; i < kSplitKept; ++i) largest = Largest(largest, kept[i]);
  for (int column = kFar + thread * 8; column < columns; column += kStep) {
    largest = Largest(largest, LoadEight(from, column, columns));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) largest_of[row][thread / 32] = largest;
  __syncthreads();
  if (!here) return;
#pragma unroll
  for (int i = 0; i < kSplitThreads / 32; ++i) largest = max(largest, largest_of[row][i]);
  const SplitScale scale(largest);
  const int64_t bytes = 128 * split.blocks;  // of a part
  uint8_t* to = split.parts + 2 * bytes * output;
#pragma unroll
  for (int i = 0; i < kSplitKept; ++i) {
    const int column = i * kStep + thread * 8;
    if (column < bytes) StoreParts(to + column, bytes, kept[i], scale.inverse);
  }
  for (int column = kFar + thread * 8; column < bytes; column += kStep) {
    StoreParts(to + column, bytes, LoadEight(from, column, columns), scale.inverse);
  }
  if (thread == 0) split.scales[output] = scale.scale;
}

// The pairs keep the order of the outputs inside an expert: each warp takes consecutive slots, counts their pairs by
// expert, and later places them after those of the warps and blocks before it.
__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const FfnPlanParams p) {
  __shared__ int counts[kPlanWarps][kGroupedFfnExpertsMax];
  __shared__ int rows[kGroupedFfnExpertsMax];    // of an expert, then its first pair
  __shared__ int before[kGroupedFfnExpertsMax];  // pairs of the blocks before
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LaunchDependents();
  if (blockIdx.x >= p.blocks) {
    return SplitRow(p, blockIdx.x - p.blocks, reinterpret_cast<uint32_t (*)[kSplitThreads / 32]>(counts));
  }
  const Range range = Part(p, warp);
  if (warp < range.warps) Count(p, range, lane, counts[warp]);
  if (p.blocks > 1) DependentWait();
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kPlanThreads) {
    int sum = 0;
#pragma unroll 4
    for (int w = 0; w < range.warps; ++w) {
      const int count = counts[w][e];
      counts[w][e] = sum;
      sum += count;
    }
    int all = sum, earlier = 0;
    if (p.blocks > 1) {
      all = 0;
#pragma unroll 8
      for (int b = 0; b < p.blocks; ++b) {
        const int count = p.tables.block_counts[b * p.experts + e];
        earlier += b < blockIdx.x ? count : 0;
        all += count;
      }
    }
    rows[e] = all;
    before[e] = earlier;
  }
  __syncthreads();
  if (warp == 0) {
    // A lane has the experts first ... first + per_lane - 1.
    const int per_lane = Ceil(p.experts, 32), first = lane * per_lane, last = min(first + per_lane, p.experts);
    int solo_units = p.solo_units;
    if (solo_units == 0) {
      int items = 0;
      for (int e = first; e < last; ++e) items += Items(rows[e], p.tile_rows, p.units.units1, 2);
      solo_units = WarpSum(items) < p.clusters ? 1 : 2;
    }
    FfnExpert sum = {};
    for (int e = first; e < last; ++e) {
      sum.row += rows[e];
      sum.tiles += Ceil(rows[e], kFfnPortableTileRows);
      sum.items1 += Items(rows[e], p.tile_rows, p.units.units1, solo_units);
      sum.items2 += Items(rows[e], p.tile_rows, p.units.units2, solo_units);
    }
    FfnExpert at = {WarpBefore(sum.row, lane), WarpBefore(sum.tiles, lane), WarpBefore(sum.items1, lane),
                    WarpBefore(sum.items2, lane)};
    for (int e = first; e < last; ++e) {
      const int count = rows[e];
      if (blockIdx.x == 0) {
        p.tables.experts[e] = at;
        p.tables.done[e] = 0;
      }
      rows[e] = at.row + before[e];
      at.row += count;
      at.tiles += Ceil(count, kFfnPortableTileRows);
      at.items1 += Items(count, p.tile_rows, p.units.units1, solo_units);
      at.items2 += Items(count, p.tile_rows, p.units.units2, solo_units);
    }
    if (blockIdx.x == 0) {
      if (last == p.experts && first < last) p.tables.experts[p.experts] = at;
      // A cluster's first item has the cluster's number.
      if (lane == 0) p.tables.counters[0] = p.clusters, p.tables.counters[1] = solo_units;
    }
  }
  __syncthreads();
  for (int i = range.begin; i < range.end; i += 32 * kBatch) {
    int expert[kBatch], source[kBatch];
    LoadBatch(p, range, i, lane, expert);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      source[j] = (i + j * 32 + lane) / p.slots;
      if (p.source != nullptr && expert[j] >= 0) source[j] = p.source[source[j]];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * 32 >= range.end) break;
      const uint32_t same = __match_any_sync(~0u, expert[j]);
      const int rank = __popc(same & ((1u << lane) - 1));
      int position = -1;
      if (expert[j] >= 0) {
        position = rows[expert[j]] + counts[warp][expert[j]] + rank;
        p.tables.pair_source[position] = source[j];
      }
      __syncwarp();
      if (expert[j] >= 0 && rank == 0) counts[warp][expert[j]] += __popc(same);
      __syncwarp();
      if (i + j * 32 + lane < range.end) p.tables.position[i + j * 32 + lane] = position;
    }
  }
}

__device__ __forceinline__ float2 Halves(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

__device__ __forceinline__ bool Finite(uint32_t packed) {
  return (packed & 0x7f80u) != 0x7f80u && (packed & 0x7f800000u) != 0x7f800000u;
}

__device__ __forceinline__ void DiscardLine(const uint8_t* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

constexpr int kReduceChunks = 4;  // of 8 columns, that a thread asks for at once
constexpr int kReduceThreadsMax = 256;

// One output a block: small blocks, so that while some look their pairs up others move data.
__global__ void __launch_bounds__(kReduceThreadsMax) ReduceKernel(const FfnReduceParams p) {
  __shared__ int positions[32];
  __shared__ float weights[32];
  __shared__ int count;
  LaunchDependents();
  DependentWait();
  const int output = blockIdx.x, outputs = p.outputs_used == nullptr ? p.outputs : min(*p.outputs_used, p.outputs);
  if (output >= outputs) return;
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const int64_t slot = static_cast<int64_t>(output) * p.slots + lane;
    const int position = lane < p.slots ? p.position[slot] : -1;
    const float weight = lane < p.slots ? p.slot_weights[slot] : 0;
    const uint32_t pairs = __ballot_sync(~0u, position >= 0);
    if (position >= 0) {
      const int at = __popc(pairs & ((1u << lane) - 1));
      positions[at] = position;
      weights[at] = weight;
    }
    if (lane == 0) count = __popc(pairs);
  }
  const int64_t row = p.partial_rows != nullptr ? p.partial_rows[output] : output;
  __syncthreads();
  const int n = count;
  if (n == 0 && p.partial == nullptr) return;
  bool finite = true;
  const int step = blockDim.x * 8;
  for (int first = threadIdx.x * 8; first < p.hidden; first += kReduceChunks * step) {
    float sum[kReduceChunks][8] = {};
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      const uint16_t* from = p.pairs + static_cast<int64_t>(positions[i]) * p.hidden + first;
      const float weight = weights[i];
      uint4 pair[kReduceChunks];
#pragma unroll
      for (int c = 0; c < kReduceChunks; ++c) {
        if (first + c * step < p.hidden) pair[c] = __ldcs(reinterpret_cast<const uint4*>(from + c * step));
      }
#pragma unroll
      for (int c = 0; c < kReduceChunks; ++c) {
        const uint32_t packed[4] = {pair[c].x, pair[c].y, pair[c].z, pair[c].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 values = Halves(packed[j]);
          sum[c][2 * j] = fmaf(weight, values.x, sum[c][2 * j]);
          sum[c][2 * j + 1] = fmaf(weight, values.y, sum[c][2 * j + 1]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kReduceChunks; ++c) {
      if (first + c * step >= p.hidden) break;
      const int64_t to = row * p.hidden + first + c * step;
      if (p.partial != nullptr) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __nv_bfloat162 both = __floats2bfloat162_rn(sum[c][2 * j], sum[c][2 * j + 1]);
          packed[j] = *reinterpret_cast<const uint32_t*>(&both);
          finite &= Finite(packed[j]);
        }
        *reinterpret_cast<uint4*>(p.partial + to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      } else {
        float4* residual = reinterpret_cast<float4*>(p.x_residual + to);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float4 value = residual[j];
          value.x += sum[c][4 * j], value.y += sum[c][4 * j + 1];
          value.z += sum[c][4 * j + 2], value.w += sum[c][4 * j + 3];
          residual[j] = value;
        }
      }
    }
  }
  // The pairs are used up, and so is the block's share of what was between the products. Left alone, both would be written to
  // memory in the middle of a later call's reads of weights.
  __syncthreads();
  if (p.hidden % 64 == 0) {
    const int lines = p.hidden / 64;
    for (int i = threadIdx.x; i < n * lines; i += blockDim.x) {
      DiscardLine(reinterpret_cast<const uint8_t*>(p.pairs) +
                  (static_cast<int64_t>(positions[i / lines]) * lines + i % lines) * 128);
    }
  }
  const int64_t lines =
      static_cast<int64_t>(p.experts[p.expert_count].row + p.inner_pairs_more) * p.inner_pair_bytes / 128;
  const int64_t share = (lines + outputs - 1) / outputs, end = min((output + 1) * share, lines);
  for (int64_t i = output * share + threadIdx.x; i < end; i += blockDim.x) DiscardLine(p.inner + i * 128);
  if (p.finite != nullptr) {
    const int all = __syncthreads_and(finite);
    if (threadIdx.x == 0) p.finite[output] = all != 0;
  }
}

template <class Params>
cudaError_t LaunchAfter(void (*kernel)(Params), const Params& params, dim3 blocks, dim3 threads, bool chained,
                        cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = chained ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace

cudaError_t LaunchFfnPlan(const FfnPlanParams& params, bool chained, cudaStream_t stream) {
  FfnPlanParams p = params;
  p.blocks = (p.outputs * p.slots + p.block_slots - 1) / p.block_slots;
  if (p.blocks > 1) {
    CountKernel<<<p.blocks, kPlanThreads, 0, stream>>>(p);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const int splits = p.split.parts == nullptr ? 0 : (p.outputs + kSplitRows - 1) / kSplitRows;
  return LaunchAfter(PlanKernel, p, dim3(p.blocks + splits), dim3(kPlanThreads), chained && p.blocks > 1, stream);
}

cudaError_t LaunchFfnReduce(const FfnReduceParams& params, bool chained, cudaStream_t stream) {
  const int wanted = (params.hidden / 8 + kReduceChunks - 1) / kReduceChunks;
  const dim3 threads(std::min(kReduceThreadsMax, (wanted + 31) / 32 * 32));
  return LaunchAfter(ReduceKernel, params, dim3(params.outputs), threads, chained, stream);
}

}  // namespace minke::cuda
