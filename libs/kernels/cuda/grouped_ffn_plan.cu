// Before and after the products: sorts the pairs by expert and shares the work out; adds up the pairs of each output.
#include <cuda_bf16.h>

#include <algorithm>

#include "libs/kernels/cuda/grouped_ffn_kernels.h"

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

// The pairs keep the order of the outputs inside an expert: each warp takes consecutive slots, counts their pairs by
// expert, and later places them after those of the warps and blocks before it.
__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const FfnPlanParams p) {
  __shared__ int counts[kPlanWarps][kGroupedFfnExpertsMax];
  __shared__ int rows[kGroupedFfnExpertsMax];    // of an expert, then its first pair
  __shared__ int before[kGroupedFfnExpertsMax];  // pairs of the blocks before
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LaunchDependents();
  const Range range = Part(p, warp);
  if (warp < range.warps) Count(p, range, lane, counts[warp]);
  if (gridDim.x > 1) DependentWait();
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
    if (gridDim.x > 1) {
      all = 0;
#pragma unroll 8
      for (int b = 0; b < gridDim.x; ++b) {
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

// Forgets `lines` lines of 128 bytes of each of n pairs.
__device__ __forceinline__ void Discard(const uint8_t* data, int lines, const int* positions, int n) {
  for (int i = threadIdx.x; i < n * lines; i += blockDim.x) {
    const uint8_t* line = data + (static_cast<int64_t>(positions[i / lines]) * lines + i % lines) * 128;
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
  }
}

// One output a block, 8 columns a thread at a time.
__global__ void __launch_bounds__(1024) ReduceKernel(const FfnReduceParams p) {
  __shared__ int positions[32];
  __shared__ float weights[32];
  __shared__ int count;
  LaunchDependents();
  DependentWait();
  const int output = blockIdx.x;
  if (p.outputs_used != nullptr && output >= *p.outputs_used) return;
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const int64_t slot = static_cast<int64_t>(output) * p.slots + lane;
    const int position = lane < p.slots ? p.position[slot] : -1;
    const uint32_t pairs = __ballot_sync(~0u, position >= 0);
    if (position >= 0) {
      const int at = __popc(pairs & ((1u << lane) - 1));
      positions[at] = position;
      weights[at] = p.slot_weights[slot];
    }
    if (lane == 0) count = __popc(pairs);
  }
  __syncthreads();
  const int n = count;
  if (n == 0 && p.partial == nullptr) return;
  const int64_t row = p.partial_rows != nullptr ? p.partial_rows[output] : output;
  bool finite = true;
  for (int column = threadIdx.x * 8; column < p.hidden; column += blockDim.x * 8) {
    float sum[8] = {};
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      const uint4 pair =
          __ldcs(reinterpret_cast<const uint4*>(p.pairs + static_cast<int64_t>(positions[i]) * p.hidden + column));
      const float weight = weights[i];
      const uint32_t packed[4] = {pair.x, pair.y, pair.z, pair.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 values = Halves(packed[j]);
        sum[2 * j] = fmaf(weight, values.x, sum[2 * j]);
        sum[2 * j + 1] = fmaf(weight, values.y, sum[2 * j + 1]);
      }
    }
    const int64_t to = row * p.hidden + column;
    if (p.partial != nullptr) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(sum[2 * j], sum[2 * j + 1]);
        packed[j] = *reinterpret_cast<const uint32_t*>(&both);
        finite &= Finite(packed[j]);
      }
      *reinterpret_cast<uint4*>(p.partial + to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    } else {
      float4* residual = reinterpret_cast<float4*>(p.x_residual + to);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float4 value = residual[j];
        value.x += sum[4 * j], value.y += sum[4 * j + 1], value.z += sum[4 * j + 2], value.w += sum[4 * j + 3];
        residual[j] = value;
      }
    }
  }
  // The pairs are used up. Left alone, they would be written to memory in the middle of a later call's reads of weights.
  __syncthreads();
  if (p.hidden % 64 == 0) Discard(reinterpret_cast<const uint8_t*>(p.pairs), p.hidden / 64, positions, n);
  Discard(p.inner, p.inner_lines, positions, n);
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
  const int blocks = (params.outputs * params.slots + params.block_slots - 1) / params.block_slots;
  if (blocks > 1) {
    CountKernel<<<blocks, kPlanThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return LaunchAfter(PlanKernel, params, dim3(blocks), dim3(kPlanThreads), chained && blocks > 1, stream);
}

cudaError_t LaunchFfnReduce(const FfnReduceParams& params, bool chained, cudaStream_t stream) {
  const dim3 threads(std::min(1024, (params.hidden / 8 + 31) / 32 * 32));
  return LaunchAfter(ReduceKernel, params, dim3(params.outputs), threads, chained, stream);
}

}  // namespace minke::cuda
