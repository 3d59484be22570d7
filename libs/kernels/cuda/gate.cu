// Two kernels, the second set up while the first runs. In the first a block computes one tile of logits over its part
// of the hidden dimension with mma.sync, fed by cp.async through kStages buffers. In the second a warp per row adds the
// parts up in order and chooses: spread over the whole GPU that takes 2 us, where the last block of a tile would
// take 10.
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

// One row: lane l has the logits of experts l, l + 32, ... `keys` is the warp's own shared memory.
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
#pragma unroll 4
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
__global__ void __launch_bounds__(S::kThreads) LogitsKernel(const GateParams p) {
  extern __shared__ __align__(128) uint8_t bytes[];
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
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  constexpr int64_t kTile = S::kRows * S::kColumns;
  float* part = p.partials + (tile * p.splits + split) * kTile;
  const int row = warp / S::kWarpsN * (S::kTilesM * 16) + lane / 4;
  const int column = warp % S::kWarpsN * (S::kTilesN * 8) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      float* to = part + (row + m * 16) * S::kColumns + column + n * 8;
      *reinterpret_cast<float2*>(to) = make_float2(d[m][n][0], d[m][n][1]);
      *reinterpret_cast<float2*>(to + 8 * S::kColumns) = make_float2(d[m][n][2], d[m][n][3]);
    }
  }
}

constexpr int kChooseWarps = 4;

template <int kColumns>
__global__ void __launch_bounds__(32 * kChooseWarps) ChooseKernel(const GateParams p) {
  __shared__ uint32_t keys[kChooseWarps][kColumns];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kChooseWarps + warp, tile = row / p.tile_rows;
  if (row >= p.args.rows) return;
  const float* from = p.partials + (tile * p.splits * p.tile_rows + row % p.tile_rows) * kColumns + lane;
  float logits[kColumns / 32] = {};
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s, from += static_cast<int64_t>(p.tile_rows) * kColumns) {
#pragma unroll
    for (int j = 0; j < kColumns / 32; ++j) logits[j] += __ldcg(from + 32 * j);
  }
  Choose<kColumns>(p, row, logits, lane, keys[warp]);
}

template <int kColumns>
cudaError_t LaunchChooseOf(const GateParams& p, bool overlapped, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.args.rows + kChooseWarps - 1) / kChooseWarps));
  config.blockDim = dim3(32 * kChooseWarps);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  return cudaLaunchKernelEx(&config, ChooseKernel<kColumns>, p);
}

template <class S>
cudaError_t Launch(const GateParams& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(LogitsKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.splits, static_cast<unsigned>((p.args.rows + S::kRows - 1) / S::kRows));
  LogitsKernel<S><<<grid, S::kThreads, S::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLogitsPortable(const GateParams& p, cudaStream_t stream) {
  const int columns = GateColumns(p.experts);
  if (p.tile_rows == 16) {
    return columns == 64    ? Launch<Shape<16, 64, 1, 4, 4>>(p, stream)
           : columns == 160 ? Launch<Shape<16, 160, 1, 4, 4>>(p, stream)
                            : Launch<Shape<16, 256, 1, 8, 4>>(p, stream);
  }
  if (p.tile_rows == 64) {
    return columns == 64    ? Launch<Shape<64, 64, 2, 4, 4>>(p, stream)
           : columns == 160 ? Launch<Shape<64, 160, 2, 4, 4>>(p, stream)
                            : Launch<Shape<64, 256, 2, 4, 4>>(p, stream);
  }
  return columns == 64 ? Launch<Shape<128, 64, 4, 4, 4>>(p, stream) : Launch<Shape<128, 160, 4, 4, 4>>(p, stream);
}

cudaError_t LaunchChoose(const GateParams& p, bool overlapped, cudaStream_t stream) {
  const int columns = GateColumns(p.experts);
  return columns == 64    ? LaunchChooseOf<64>(p, overlapped, stream)
         : columns == 160 ? LaunchChooseOf<160>(p, overlapped, stream)
                          : LaunchChooseOf<256>(p, overlapped, stream);
}

}  // namespace minke::cuda
