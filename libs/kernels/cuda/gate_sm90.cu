// The gate's logits for many rows on Hopper: a block computes 64 or 128 rows x all experts over its part of the hidden
// dimension. One warp feeds a ring of stages by bulk tensor copies, a warpgroup per 64 rows multiplies with wgmma. Both
// operands lie in rows of 128 bytes under the 128-byte swizzle; what lies outside the tensors is zero.
#include <algorithm>

#include "libs/kernels/cuda/gate_kernels.h"
#include "libs/kernels/cuda/products.cuh"

namespace minke::cuda {
namespace {

using namespace ptx;

template <int kGroups_, int kColumns_>
struct Shape {
  static constexpr int kGroups = kGroups_, kColumns = kColumns_, kRows = 64 * kGroups;
  static constexpr int kRowBytes = kRows * 128, kStage = kRowBytes + kColumns * 128;
  static constexpr int kStages = std::min(6, (226 * 1024) / kStage);
  static constexpr int kFull = kStages * kStage, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
  static constexpr int kThreads = 128 * kGroups + 32;
  // One or two products side by side cover the columns.
  static constexpr int kFirst = kColumns == 64 ? 64 : 128, kSecond = kColumns - kFirst;
  static_assert(kBytes <= 227 * 1024);
};

template <int kColumns, int n>
__device__ __forceinline__ void Store(float* part, const float (&d)[n], int row, int column) {
#pragma unroll
  for (int i = 0; i < n / 4; ++i) {
    float* to = part + row * kColumns + column + 8 * i;
    *reinterpret_cast<float2*>(to) = make_float2(d[4 * i], d[4 * i + 1]);
    *reinterpret_cast<float2*>(to + 8 * kColumns) = make_float2(d[4 * i + 2], d[4 * i + 3]);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    LogitsKernel(const GateParams p, const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap w_map) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.x, tile = blockIdx.y;
  const int k_begin = split * p.k_steps * kGateStep;
  const int steps = min(p.k_steps, (p.hidden - k_begin + kGateStep - 1) / kGateStep);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      BarrierInit(base + S::kFull + 8 * s, 1);
      BarrierInit(base + S::kEmpty + 8 * s, 4 * S::kGroups);  // a warp each
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (warp == 4 * S::kGroups) {
    if (lane == 0) {
      for (int s = 0; s < steps; ++s) {
        const int stage = s % S::kStages;
        const uint32_t full = base + S::kFull + 8 * stage, to = base + stage * S::kStage;
        if (s >= S::kStages) BarrierWait(base + S::kEmpty + 8 * stage, (s / S::kStages - 1) & 1);
        BarrierExpect(full, S::kStage);
        Load2D(to, &x_map, k_begin + s * kGateStep, tile * S::kRows, full);
        Load2D(to + S::kRowBytes, &w_map, k_begin + s * kGateStep, 0, full);
      }
    }
    return;
  }
  float first[S::kFirst / 2] = {};
  float second[S::kSecond > 0 ? S::kSecond / 2 : 4] = {};
  for (int s = 0; s < steps; ++s) {
    const int stage = s % S::kStages;
    BarrierWait(base + S::kFull + 8 * stage, (s / S::kStages) & 1);
    const uint32_t rows = base + stage * S::kStage + warp / 4 * 8192, columns = base + stage * S::kStage + S::kRowBytes;
    Pin(first);
    Pin(second);
    ProductsBegin();
#pragma unroll
    for (int k = 0; k < kGateStep / 16; ++k) {
      const uint64_t a = Descriptor(rows + k * 32, 1024, 16);
      ProductShared(first, a, Descriptor(columns + k * 32, 1024, 16), 1);
      if constexpr (S::kSecond > 0)
        ProductShared(second, a, Descriptor(columns + S::kFirst * 128 + k * 32, 1024, 16), 1);
    }
    ProductsCommit();
    ProductsWait<1>();  // the step before this one is done with its stage
    if (s > 0 && lane == 0) BarrierArrive(base + S::kEmpty + 8 * ((s - 1) % S::kStages));
  }
  ProductsWait<0>();
  Pin(first);
  Pin(second);
  LaunchDependents();
  float* part = p.partials + static_cast<int64_t>(tile * p.splits + split) * S::kRows * S::kColumns;
  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
  Store<S::kColumns>(part, first, row, column);
  if constexpr (S::kSecond > 0) Store<S::kColumns>(part, second, row, column + S::kFirst);
#endif
}

template <class S>
cudaError_t Launch(const GateParams& p, const CUtensorMap& x_map, const CUtensorMap& w_map, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(LogitsKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.splits, static_cast<unsigned>((p.args.rows + S::kRows - 1) / S::kRows));
  LogitsKernel<S><<<grid, S::kThreads, S::kBytes, stream>>>(p, x_map, w_map);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLogitsSm90(const GateParams& p, const CUtensorMap& x_map, const CUtensorMap& w_map,
                             cudaStream_t stream) {
  const int columns = GateColumns(p.experts);
  const auto launch = p.tile_rows == 64 ? (columns == 64    ? Launch<Shape<1, 64>>
                                           : columns == 160 ? Launch<Shape<1, 160>>
                                                            : Launch<Shape<1, 256>>)
                                        : (columns == 64    ? Launch<Shape<2, 64>>
                                           : columns == 160 ? Launch<Shape<2, 160>>
                                                            : Launch<Shape<2, 256>>);
  return launch(p, x_map, w_map, stream);
}

}  // namespace minke::cuda
