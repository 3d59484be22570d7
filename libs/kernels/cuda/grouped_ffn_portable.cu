// Grouped SwiGLU for any GPU from sm_80 on: the plain form. A block computes one unit of weight rows for up to 64 pairs of
// an expert; weights are the left operand, so that a thread has gate and up of a column in one fragment.
#include <cuda_bf16.h>

#include "libs/kernels/cuda/grouped_ffn_kernels.h"
#include "libs/kernels/cuda/mma_sm80.cuh"

namespace minke::cuda {
namespace {

using namespace sm80;

constexpr int kThreads = 128;
constexpr int kPairs = kFfnPortableTileRows;
constexpr int kStages = 3;
constexpr int kStageWeights = kFfnWeightBytes;  // enough for either format
constexpr int kStageBytes = kStageWeights + kPairs * 128;
constexpr int kSharedBytes = kStages * kStageBytes;

__device__ __forceinline__ void CopyAsync(void* to, const void* from, bool valid) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
}

// Row r, 16-byte piece c of rows of 128 bytes.
__device__ __forceinline__ int Swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// Two e4m3 values times their factor. Shifted into place, the bits of e4m3 are those
// of a bf16 2^120 times smaller; `factor` (two times the same bf16) makes up for it, exactly.
__device__ __forceinline__ uint32_t ExpandFP8(uint32_t two, uint32_t factor) {
  const uint32_t bytes = __byte_perm(two, 0, 0x1404);  // to bytes 1 and 3
  const uint32_t a = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
  const __nv_bfloat162 x = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&factor));
  return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ uint32_t Factor(float scale) {
  return __bfloat16_as_ushort(__float2bfloat16(scale * 0x1p120f)) * 0x10001u;
}

// A step of the products is 64 columns, half of a block of e4m3: 128 rows of 64 bytes.
// kDown = false: inner = silu(gate x) * (up x); true: pairs = down inner.
template <FfnFormat kFormat, bool kDown>
__global__ void __launch_bounds__(kThreads) ProductKernel(const FfnParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr bool kFP8 = kFormat == FfnFormat::kFP8;
  constexpr int kColumns = kFfnBlockColumns<kFormat>, kBytes = kFfnBlockBytes<kFormat>, kHalves = kColumns / 64;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int units = kDown ? p.units.units2 : p.units.units1, blocks = kDown ? p.units.blocks2 : p.units.blocks1;
  const int steps = blocks * kHalves;
  const int64_t inner_row = p.units.blocks2 * kColumns;
  uint16_t* const inner = reinterpret_cast<uint16_t*>(p.inner);
  const int64_t row_values = kDown ? inner_row : p.hidden;
  const int columns = kDown ? p.units.units1 * 64 : p.hidden;  // what there is of a row; the rest is zero
  const int64_t items = static_cast<int64_t>(p.tables.experts[p.experts].tiles) * units;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int tile = static_cast<int>(item / units), unit = static_cast<int>(item % units);
    int expert = 0;
    for (int step = kGroupedFfnExpertsMax; step > 0; step /= 2) {
      if (expert + step < p.experts && p.tables.experts[expert + step].tiles <= tile) expert += step;
    }
    const FfnExpert at = p.tables.experts[expert];
    const int first = at.row + (tile - at.tiles) * kPairs;
    const int count = min(kPairs, p.tables.experts[expert + 1].row - first);
    const uint8_t* weights =
        (kDown ? p.down : p.gate_up) + (static_cast<int64_t>(expert) * units + unit) * blocks * kBytes;

    // A thread fetches one 16-byte column of every 16th pair.
    const int piece = thread % 8;
    const uint16_t* rows[kPairs / 16];
#pragma unroll
    for (int i = 0; i < kPairs / 16; ++i) {
      const int pair = first + min(thread / 8 + 16 * i, count - 1);
      rows[i] = (kDown ? inner + pair * inner_row : p.x + p.tables.pair_source[pair] * row_values) + piece * 8;
    }
    const auto fetch = [&](int step) {
      if (step < steps) {
        uint8_t* to = shared + step % kStages * kStageBytes;
        const uint8_t* from = weights + static_cast<int64_t>(step / kHalves) * kBytes;
        if constexpr (kFP8) {
          for (int i = thread; i < kFfnUnitRows * 4; i += kThreads) {
            const int row = i / 4, chunk = i % 4 + step % kHalves * 4;
            CopyAsync(to + i * 16, from + row * 128 + ((chunk ^ (row & 7)) << 4), true);
          }
        } else {
          for (int i = thread * 16; i < kBytes; i += kThreads * 16) CopyAsync(to + i, from + i, true);
        }
        const bool inside = step * 64 + piece * 8 < columns;
#pragma unroll
        for (int i = 0; i < kPairs / 16; ++i) {
          const int row = thread / 8 + 16 * i;
          const bool valid = inside && row < count;
          CopyAsync(to + kStageWeights + Swizzled(row, piece), valid ? rows[i] + step * 64 : rows[0], valid);
        }
      }
      CommitCopies();
    };
    float d[2][8][4] = {};
    __syncthreads();
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
      WaitCopies();
      __syncthreads();
      fetch(step + kStages - 1);
      const uint8_t* stage = shared + step % kStages * kStageBytes;
      const uint8_t* pairs = stage + kStageWeights;
      uint32_t factors[2];
      if constexpr (kFP8) {
        const float* scales =
            reinterpret_cast<const float*>(weights + static_cast<int64_t>(step / kHalves) * kBytes + kFfnWeightBytes);
        factors[0] = Factor(scales[0]), factors[1] = Factor(scales[1]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          if constexpr (kFP8) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = t * 64 + warp * 16 + lane / 4 + i % 2 * 8, column = k * 16 + lane % 4 * 2 + i / 2 * 8;
              a[t][i] = ExpandFP8(*reinterpret_cast<const uint16_t*>(stage + row * 64 + column), factors[i % 2]);
            }
          } else {
            const int row = t * 64 + warp * 16 + (lane & 15);
            LoadMatrix4(a[t], reinterpret_cast<const uint16_t*>(stage + Swizzled(row, 2 * k + lane / 16)));
          }
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          uint32_t b[4];
          const int row = i * 8 + lane / 16 * 8 + lane % 8;
          LoadMatrix4(b, reinterpret_cast<const uint16_t*>(pairs + Swizzled(row, 2 * k + (lane / 8 & 1))));
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            Product(d[t][i], a[t], b[0], b[1]);
            Product(d[t][i + 1], a[t], b[2], b[3]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = i * 8 + 2 * (lane & 3) + c;
          if (row >= count) continue;
          const float low = d[t][i][c], high = d[t][i][c + 2];
          if constexpr (kDown) {
            uint16_t* to = p.pairs + static_cast<int64_t>(first + row) * p.hidden;
            const int column = unit * 128 + t * 64 + warp * 16 + lane / 4;
            if (column < p.hidden) to[column] = __bfloat16_as_ushort(__float2bfloat16(low));
            if (column + 8 < p.hidden) to[column + 8] = __bfloat16_as_ushort(__float2bfloat16(high));
          } else {
            const int column = unit * 64 + t * 32 + warp * 8 + lane / 4;
            const float value = low / (1.f + __expf(-low)) * high;
            inner[(first + row) * inner_row + column] = __bfloat16_as_ushort(__float2bfloat16(value));
          }
        }
      }
    }
  }
}

template <FfnFormat kFormat>
cudaError_t Launch(const FfnParams& params, int blocks, cudaStream_t stream) {
  for (const auto kernel : {ProductKernel<kFormat, false>, ProductKernel<kFormat, true>}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, kThreads, kSharedBytes, stream>>>(params);
    if (const cudaError_t launched = cudaGetLastError(); launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchFfnPortable(const FfnParams& params, FfnFormat format, int multiprocessors, cudaStream_t stream) {
  switch (format) {
    case FfnFormat::kBF16:
      return Launch<FfnFormat::kBF16>(params, 2 * multiprocessors, stream);
    case FfnFormat::kFP8:
      return Launch<FfnFormat::kFP8>(params, 2 * multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace minke::cuda
