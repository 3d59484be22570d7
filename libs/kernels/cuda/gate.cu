// A block computes one tile of logits over its part of the hidden dimension with mma.sync, fed by cp.async through
// kStages buffers. Parts meet in device memory; the block that comes last adds them up in order and chooses the experts:
// a thread per row where there are many rows (a warp takes as long for one row as a thread does), a warp where few.
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
  static constexpr int kLogitsStride = kColumns + 1;  // threads that read a column of it use every bank
  static_assert(kSharedBytes >= (kRows * kLogitsStride + kRows * 33) * 4);  // logits and group maxima, at the end
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
    uint32_t b[S::kTilesN][4];
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      LoadMatrix4(b[n], stage + Swizzled(column + n * 8 + lane % 8, half * 4 + lane / 8));
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // no product waits for the one before it
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) Product(d[m][n], a[k][m], b[n][2 * k], b[n][2 * k + 1]);
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

__device__ __forceinline__ void ChooseNothing(const GateParams& p, int64_t row, GateStatus status) {
  for (int i = 0; i < p.k; ++i) p.args.experts[row * p.k + i] = -1, p.args.weights[row * p.k + i] = 0;
  p.args.status[row] = static_cast<uint8_t>(status);
}

// One row by a warp: lane l has the logits of experts l, l + 32, ... `from`: the row's logits, `keys`: the warp's own,
// both in shared memory.
template <int kColumns>
__device__ __forceinline__ void ChooseByWarp(const GateParams& p, int64_t row, const float* from, int lane,
                                          uint32_t* keys) {
  constexpr int kPerLane = kColumns / 32;
  float logits[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) logits[j] = from[lane + 32 * j];
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
    if (lane == 0) ChooseNothing(p, row, padding ? GateStatus::kPadding : GateStatus::kRejected);
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

constexpr int kAloneMax = 8;  // choices that a thread keeps in registers

// One row by a thread, as kernels::RouteToken does it. `logits` and `groups` in shared memory.
__device__ __forceinline__ void ChooseByThread(const GateParams& p, int64_t row, const float* logits, float* groups) {
  if (p.args.rows_used != nullptr && row >= *p.args.rows_used) return ChooseNothing(p, row, GateStatus::kPadding);
  bool finite = true;
  float maximum = -INFINITY;
#pragma unroll 8
  for (int e = 0; e < p.experts; ++e) finite = finite && isfinite(logits[e]), maximum = fmaxf(maximum, logits[e]);
  if (p.args.logits != nullptr) {
    for (int e = 0; e < p.experts; ++e) p.args.logits[row * p.experts + e] = logits[e];
  }
  if (!finite) return ChooseNothing(p, row, GateStatus::kRejected);
  float sum = 0;
#pragma unroll 8
  for (int e = 0; e < p.experts; ++e) sum += expf(logits[e] - maximum);
  const int size = p.experts / p.groups;
  uint32_t kept = p.topk_groups < p.groups ? 0 : ~0u;
  if (kept == 0) {
    for (int g = 0; g < p.groups; ++g) {
      float best = -INFINITY;
#pragma unroll 4
      for (int e = g * size; e < (g + 1) * size; ++e) best = fmaxf(best, logits[e]);
      groups[g] = best;
    }
    for (int round = 0; round < p.topk_groups; ++round) {
      int group = 0;
      float best = -INFINITY;
      for (int g = 0; g < p.groups; ++g) {
        if (!(kept >> g & 1) && groups[g] > best) best = groups[g], group = g;
      }
      kept |= 1u << group;
    }
  }
  float value[kAloneMax];
  int expert[kAloneMax];
#pragma unroll
  for (int i = 0; i < kAloneMax; ++i) value[i] = -INFINITY, expert[i] = 0x7fffffff;
  for (int g = 0; g < p.groups; ++g) {
    if (!(kept >> g & 1)) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      float v = logits[e];
      if (v <= value[kAloneMax - 1]) continue;
      int at = e;
      bool in = false;
#pragma unroll
      for (int i = 0; i < kAloneMax; ++i) {  // into its place; what was there and behind moves down
        in = in || v > value[i];
        const float old_value = value[i];
        const int old_expert = expert[i];
        if (in) value[i] = v, expert[i] = at, v = old_value, at = old_expert;
      }
    }
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kAloneMax; ++i) {
    value[i] = i < p.k ? expf(value[i] - maximum) / sum : 0.f;
    total += value[i];
  }
  const float scale = p.normalise ? 1 / (total + 1e-20f) : p.scale;
#pragma unroll
  for (int i = 0; i < kAloneMax; ++i) {
    if (i >= p.k) break;
    int rank = 0;
#pragma unroll
    for (int j = 0; j < kAloneMax; ++j) rank += j < p.k && expert[j] < expert[i] ? 1 : 0;
    p.args.experts[row * p.k + rank] = expert[i];
    p.args.weights[row * p.k + rank] = value[i] * scale;
  }
  p.args.status[row] = static_cast<uint8_t>(GateStatus::kRouted);
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

  const int rows = static_cast<int>(min(static_cast<int64_t>(S::kRows), p.args.rows - row_begin));
  float* logits = reinterpret_cast<float*>(bytes);  // [rows, kLogitsStride]: the stages are done with
  const int row = warp / S::kWarpsN * (S::kTilesM * 16) + lane / 4;
  const int column = warp % S::kWarpsN * (S::kTilesN * 8) + lane % 4 * 2;
  if (p.splits == 1) {
#pragma unroll
    for (int i = 0; i < S::kTilesM * S::kTilesN * 4; ++i) {
      const int m = i / (S::kTilesN * 4), n = i / 4 % S::kTilesN;
      logits[(row + m * 16 + i / 2 % 2 * 8) * S::kLogitsStride + column + n * 8 + i % 2] = d[m][n][i % 4];
    }
    __syncthreads();
  } else {
    constexpr int64_t kTile = S::kRows * S::kColumns;
    float* parts = p.partials + tile * p.splits * kTile;
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
        float* to = parts + split * kTile + (row + m * 16) * S::kColumns + column + n * 8;
        *reinterpret_cast<float2*>(to) = make_float2(d[m][n][0], d[m][n][1]);
        *reinterpret_cast<float2*>(to + 8 * S::kColumns) = make_float2(d[m][n][2], d[m][n][3]);
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      ticket = atomicAdd(&p.counters[tile], 1u);
      if (ticket == static_cast<uint32_t>(p.splits - 1)) p.counters[tile] = 0;  // for the next launch
      __threadfence();
    }
    __syncthreads();
    if (ticket != static_cast<uint32_t>(p.splits - 1)) return;
    for (int i = threadIdx.x; i < rows * (S::kColumns / 4); i += S::kThreads) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
      for (int s = 0; s < p.splits; ++s) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(parts + s * kTile) + i);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      float* to = logits + i / (S::kColumns / 4) * S::kLogitsStride + i % (S::kColumns / 4) * 4;
      to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
    }
    __syncthreads();
  }
  constexpr int kWarps = S::kThreads / 32;
  if (rows > 2 * kWarps && p.k <= kAloneMax) {
    float* groups = logits + S::kRows * S::kLogitsStride;
    if (static_cast<int>(threadIdx.x) < rows) {
      ChooseByThread(p, row_begin + threadIdx.x, logits + threadIdx.x * S::kLogitsStride, groups + threadIdx.x * 33);
    }
    return;
  }
  for (int r = warp; r < rows; r += kWarps) {
    ChooseByWarp<S::kColumns>(p, row_begin + r, logits + r * S::kLogitsStride, lane, keys[warp]);
    __syncwarp();
  }
}

template <class S>
cudaError_t Launch(const GateParams& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(GateKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.splits, static_cast<unsigned>((p.args.rows + S::kRows - 1) / S::kRows));
  GateKernel<S><<<grid, S::kThreads, S::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
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
  return columns == 64 ? Launch<Shape<128, 64, 4, 4, 4>>(p, stream) : Launch<Shape<128, 160, 4, 4, 4>>(p, stream);
}

}  // namespace minke::cuda
