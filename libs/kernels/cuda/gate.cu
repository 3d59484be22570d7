// A block computes one tile of logits over its part of the hidden dimension with mma.sync, fed by cp.async through
// kStages buffers. Parts meet in device memory; the block that comes last (or, in a cluster, every block for its share
// of the rows) adds them up in order, and a warp chooses the experts of a row.
#include "libs/kernels/cuda/gate_kernels.h"
#include "libs/kernels/cuda/mma_sm80.cuh"

namespace minke::cuda {
namespace {

using namespace sm80;

template <int kRows_, int kColumns_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTilesM = kRows / kWarpsM / 16, kTilesN = kColumns / kWarpsN / 8;
  static constexpr int kStageValues = (kRows + kColumns) * kGateStep;
  static constexpr int kSharedBytes = kStages * kStageValues * 2;
  static_assert(kSharedBytes >= kRows * kColumns * 4);  // the finished logits of a tile that is not split
};

// Rows of 64 values are 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so that eight rows of one column
// touch every bank once.
__device__ __forceinline__ int Swizzled(int row, int chunk) { return row * kGateStep + ((chunk ^ (row & 7)) << 3); }

__device__ __forceinline__ void CopyAsync(uint16_t* to, const bf16* from, bool valid) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <class S>
__device__ __forceinline__ void LoadStep(const GateParams& p, uint16_t* stage, int64_t row_begin, int k) {
  constexpr int kChunks = (S::kRows + S::kColumns) * 8;
#pragma unroll
  for (int i = 0; i < (kChunks + S::kThreads - 1) / S::kThreads; ++i) {
    const int at = i * S::kThreads + threadIdx.x;
    if (kChunks % S::kThreads != 0 && at >= kChunks) break;
    const int row = at / 8, chunk = at % 8, column = k + chunk * 8;
    const bool of_x = row < S::kRows;
    const int64_t from = of_x ? row_begin + row : row - S::kRows;
    const bool valid = column < p.hidden && from < (of_x ? p.args.rows : p.experts);
    const bf16* base = of_x ? p.args.x : p.args.w;
    CopyAsync(stage + Swizzled(row, chunk), valid ? base + from * p.hidden + column : base, valid);
  }
}

template <class S>
__device__ __forceinline__ void MultiplyStep(const uint16_t* stage, int warp, int lane,
                                             float (&d)[S::kTilesM][S::kTilesN][4]) {
  const int row = warp / S::kWarpsN * (S::kTilesM * 16), column = S::kRows + warp % S::kWarpsN * (S::kTilesN * 8);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 of the 64 columns
    uint32_t a[2][S::kTilesM][4];
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        LoadMatrix4(a[k][m], stage + Swizzled(row + m * 16 + (lane & 15), half * 4 + k * 2 + lane / 16));
      }
    }
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      uint32_t b[4];
      LoadMatrix4(b, stage + Swizzled(column + n * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        Product(d[m][n], a[0][m], b[0], b[1]);
        Product(d[m][n], a[1][m], b[2], b[3]);
      }
    }
  }
}

// f32 ordered as u32; 0 is below every finite value.
__device__ __forceinline__ uint32_t Key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // -0 becomes 0: they tie
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float Value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// One row: lane l holds the logits of experts l, l + 32, ... `keys` is the warp's own shared memory.
template <int kColumns>
__device__ __forceinline__ void Choose(const GateParams& p, int64_t row, const float (&logits)[kColumns / 32], int lane,
                                       uint32_t* keys) {
  constexpr int kPerLane = kColumns / 32;
  bool finite = true;
  float maximum = -INFINITY;
  uint32_t key[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const bool real = lane + 32 * j < p.experts;
    if (real && p.args.logits != nullptr) p.args.logits[row * p.experts + lane + 32 * j] = logits[j];
    if (real) finite = finite && isfinite(logits[j]), maximum = fmaxf(maximum, logits[j]);
    key[j] = real ? Key(logits[j]) : 0;
  }
  const bool padding = p.args.rows_used != nullptr && row >= *p.args.rows_used;
  if (padding || !__all_sync(~0u, finite)) {
    if (lane < p.k) p.args.experts[row * p.k + lane] = -1, p.args.weights[row * p.k + lane] = 0;
    if (lane == 0) p.args.status[row] = static_cast<uint8_t>(padding ? GateStatus::kPadding : GateStatus::kRejected);
    return;
  }
  maximum = Value(__reduce_max_sync(~0u, Key(maximum)));
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (lane + 32 * j < p.experts) sum += expf(logits[j] - maximum);
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);

  if (p.topk_groups < p.groups) {
    const int size = p.experts / p.groups;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) keys[lane + 32 * j] = key[j];
    __syncwarp();
    uint32_t best = 0;
    if (lane < p.groups) {
      for (int i = 0; i < size; ++i) best = max(best, keys[lane * size + i]);
    }
    __syncwarp();
    uint32_t kept = 0;
    for (int round = 0; round < p.topk_groups; ++round) {
      const uint32_t top = __reduce_max_sync(~0u, best);
      const int group = __ffs(static_cast<int>(__ballot_sync(~0u, best == top))) - 1;
      kept |= 1u << group;
      if (lane == group) best = 0;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (lane + 32 * j < p.experts && !(kept >> ((lane + 32 * j) / size) & 1)) key[j] = 0;
    }
  }

  int expert = 0x7fffffff;  // the choice that this lane keeps
  float weight = 0;
  for (int round = 0; round < p.k; ++round) {
    uint32_t best = key[0];
    int at = lane;
#pragma unroll
    for (int j = 1; j < kPerLane; ++j) {
      if (key[j] > best) best = key[j], at = lane + 32 * j;
    }
    const uint32_t top = __reduce_max_sync(~0u, best);
    const int chosen = static_cast<int>(__reduce_min_sync(~0u, best == top ? static_cast<uint32_t>(at) : ~0u));
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (lane + 32 * j == chosen) key[j] = 0;
    }
    if (lane == round) expert = chosen, weight = expf(Value(top) - maximum) / sum;
  }
  if (p.normalise) {
    float total = weight;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(~0u, total, i);
    weight = weight / (total + 1e-20f);
  } else {
    weight *= p.scale;
  }
  int rank = 0;
  for (int i = 0; i < p.k; ++i) rank += __shfl_sync(~0u, expert, i) < expert ? 1 : 0;
  if (lane < p.k) {
    p.args.experts[row * p.k + rank] = expert;
    p.args.weights[row * p.k + rank] = weight;
  }
  if (lane == 0) p.args.status[row] = static_cast<uint8_t>(GateStatus::kRouted);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads) GateKernel(const GateParams p) {
  extern __shared__ __align__(128) uint8_t bytes[];
  __shared__ uint32_t keys[S::kThreads / 32][S::kColumns];
  __shared__ uint32_t ticket;
  uint16_t* stages = reinterpret_cast<uint16_t*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.x, tile = blockIdx.y;
  const int64_t row_begin = static_cast<int64_t>(tile) * S::kRows;
  const int k_begin = split * p.k_steps * kGateStep;
  const int steps = min(p.k_steps, (p.hidden - k_begin + kGateStep - 1) / kGateStep);

  float d[S::kTilesM][S::kTilesN][4] = {};
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) LoadStep<S>(p, stages + s * S::kStageValues, row_begin, k_begin + s * kGateStep);
    CommitCopies();
  }
  for (int s = 0; s < steps; ++s) {
    WaitCopies<S::kStages - 2>();
    __syncthreads();
    const int ahead = s + S::kStages - 1;
    if (ahead < steps) {
      LoadStep<S>(p, stages + ahead % S::kStages * S::kStageValues, row_begin, k_begin + ahead * kGateStep);
    }
    CommitCopies();
    MultiplyStep<S>(stages + s % S::kStages * S::kStageValues, warp, lane, d);
  }
  WaitCopies<0>();
  __syncthreads();

  // To shared memory if this block has the whole sum, else to device memory.
  float* tile_logits = p.splits == 1 ? reinterpret_cast<float*>(bytes)
                                     : p.partials + static_cast<int64_t>(tile * p.splits) * S::kRows * S::kColumns;
  float* mine = tile_logits + static_cast<int64_t>(split) * S::kRows * S::kColumns;
  const int row = warp / S::kWarpsN * (S::kTilesM * 16) + lane / 4;
  const int column = warp % S::kWarpsN * (S::kTilesN * 8) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      float* to = mine + (row + m * 16) * S::kColumns + column + n * 8;
      *reinterpret_cast<float2*>(to) = make_float2(d[m][n][0], d[m][n][1]);
      *reinterpret_cast<float2*>(to + 8 * S::kColumns) = make_float2(d[m][n][2], d[m][n][3]);
    }
  }

  int first = 0, last = S::kRows;
  if (p.splits > 1) {
    uint32_t* counters = p.counters + 2 * tile;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      ticket = atomicAdd(&counters[0], 1u);
      if (p.together) {
        while (*static_cast<volatile uint32_t*>(&counters[0]) < static_cast<uint32_t>(p.splits)) {
        }
        // The last to have seen that clears both for the next launch.
        if (atomicAdd(&counters[1], 1u) == static_cast<uint32_t>(p.splits - 1)) counters[0] = counters[1] = 0;
      } else if (ticket == static_cast<uint32_t>(p.splits - 1)) {
        counters[0] = 0;
      }
      __threadfence();
    }
    __syncthreads();
    if (p.together) {
      const int share = (S::kRows + p.splits - 1) / p.splits;
      first = split * share;
      last = min(S::kRows, first + share);
    } else if (ticket != static_cast<uint32_t>(p.splits - 1)) {
      return;
    }
  } else {
    __syncthreads();
  }
  last = static_cast<int>(min(static_cast<int64_t>(last), p.args.rows - row_begin));
  for (int r = first + warp; r < last; r += S::kThreads / 32) {
    float logits[S::kColumns / 32] = {};
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) {
      const float* from = tile_logits + (static_cast<int64_t>(s) * S::kRows + r) * S::kColumns + lane;
#pragma unroll
      for (int j = 0; j < S::kColumns / 32; ++j) logits[j] += p.splits == 1 ? from[32 * j] : __ldcg(from + 32 * j);
    }
    Choose<S::kColumns>(p, row_begin + r, logits, lane, keys[warp]);
    __syncwarp();
  }
}

template <class S>
cudaError_t Launch(const GateParams& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(GateKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.splits, static_cast<unsigned>((p.args.rows + S::kRows - 1) / S::kRows));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = p.splits;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = p.together ? 1 : 0;
  return cudaLaunchKernelEx(&config, GateKernel<S>, p);
}

}  // namespace

cudaError_t LaunchGate(const GateParams& p, int tile_rows, cudaStream_t stream) {
  const int columns = GateColumns(p.experts);
  if (tile_rows == 16) {
    return columns == 64    ? Launch<Shape<16, 64, 1, 4, 4>>(p, stream)
           : columns == 160 ? Launch<Shape<16, 160, 1, 4, 4>>(p, stream)
                            : Launch<Shape<16, 256, 1, 8, 4>>(p, stream);
  }
  if (tile_rows == 64) {
    return columns == 64    ? Launch<Shape<64, 64, 2, 4, 4>>(p, stream)
           : columns == 160 ? Launch<Shape<64, 160, 2, 4, 4>>(p, stream)
                            : Launch<Shape<64, 256, 2, 4, 4>>(p, stream);
  }
  return columns == 64 ? Launch<Shape<128, 64, 4, 2, 4>>(p, stream) : Launch<Shape<128, 160, 4, 2, 3>>(p, stream);
}

}  // namespace minke::cuda
