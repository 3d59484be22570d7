// Row-major bf16 weights into the kernels' order (grouped_ffn_kernels.h), as they are or in e4m3.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "libs/kernels/cuda/grouped_ffn_kernels.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScaleRows = 128, kScaleColumns = 128;

// One 16-byte piece a thread.
__global__ void __launch_bounds__(kThreads) PackBF16Kernel(const FfnPackParams p) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pieces = static_cast<int64_t>(p.units) * p.blocks * (kFfnWeightBytes / 16);
  if (piece >= pieces) return;
  const int chunk = piece % 8, row_of_unit = piece / 8 % kFfnUnitRows;
  const int block = piece / (kFfnWeightBytes / 16) % p.blocks, unit = piece / (kFfnWeightBytes / 16) / p.blocks;
  const uint16_t* from = p.first;
  int row = unit * kFfnUnitRows + row_of_unit;
  if (p.second != nullptr) {
    row = unit * (kFfnUnitRows / 2) + row_of_unit / 16 * 8 + row_of_unit % 8;
    if (row_of_unit % 16 >= 8) from = p.second;
  }
  const int column = block * 64 + chunk * 8;
  uint4 value = make_uint4(0, 0, 0, 0);
  if (row < p.rows && column < p.columns) {
    value = *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * p.columns + column);
  }
  uint8_t* to = p.to + (static_cast<int64_t>(unit) * p.blocks + block) * kFfnWeightBytes;
  *reinterpret_cast<uint4*>(to + row_of_unit * 128 + ((chunk ^ (row_of_unit & 7)) << 4)) = value;
}

// The largest magnitude / 448 rounded up to four significant bits, where times 2^120 is a bf16.
__device__ __forceinline__ float Scale(float largest) {
  if (largest == 0.f) return 1.f;
  const uint32_t bits = __float_as_uint(largest * (1.f / 448.f));
  return fminf(fmaxf(__uint_as_float((bits + 0x000fffffu) & 0xfff00000u), 0x1p-120f), 240.f);
}

// One block of 128 x 128 weights of one matrix (blockIdx.z: gate or up) a block.
__global__ void __launch_bounds__(kThreads) PackFP8Kernel(const FfnPackParams p) {
  __shared__ float warp_largest[kThreads / 32];
  __shared__ int not_finite;
  const bool paired = p.second != nullptr;
  const uint16_t* from = blockIdx.z == 0 ? p.first : p.second;
  const int first_row = blockIdx.y * kScaleRows, first_column = blockIdx.x * kScaleColumns;
  const auto read = [&](int row, int column) {
    if (row >= p.rows || column >= p.columns) return 0.f;
    return __uint_as_float(static_cast<uint32_t>(from[static_cast<int64_t>(row) * p.columns + column]) << 16);
  };
  if (threadIdx.x == 0) not_finite = 0;
  __syncthreads();
  float largest = 0;
  for (int i = threadIdx.x; i < kScaleRows * kScaleColumns; i += kThreads) {
    const float value = fabsf(read(first_row + i / kScaleColumns, first_column + i % kScaleColumns));
    if (!(value < INFINITY)) not_finite = 1;
    largest = fmaxf(largest, value);
  }
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) largest = fmaxf(largest, warp_largest[i]);
  const float scale = not_finite ? NAN : Scale(largest);

  // Pieces of 16 weights, and the scale behind each unit's block.
  const int units_here = paired ? 2 : 1, first_unit = units_here * blockIdx.y, block = blockIdx.x;
  constexpr int kBlockBytes = kFfnBlockBytes<FfnFormat::kFP8>;
  const auto block_of = [&](int unit) { return p.to + (static_cast<int64_t>(unit) * p.blocks + block) * kBlockBytes; };
  for (int i = threadIdx.x; i < kScaleRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int unit = first_unit + (paired ? row / 64 : 0);
    if (unit >= p.units) continue;
    const int row_of_unit = paired ? row % 64 / 8 * 16 + row % 8 + 8 * static_cast<int>(blockIdx.z) : row;
    uint32_t packed[4] = {};
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float value = read(first_row + row, first_column + chunk * 16 + k) / scale;
      packed[k / 4] |= static_cast<uint32_t>(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)) << k % 4 * 8;
    }
    *reinterpret_cast<uint4*>(block_of(unit) + row_of_unit * 128 + ((chunk ^ (row_of_unit & 7)) << 4)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
  if (threadIdx.x < units_here && first_unit + threadIdx.x < p.units) {
    float* scales = reinterpret_cast<float*>(block_of(first_unit + threadIdx.x) + kFfnWeightBytes);
    scales[blockIdx.z] = scale;
    if (!paired) scales[1] = scale;
  }
}

}  // namespace

cudaError_t LaunchFfnPack(const FfnPackParams& params, cudaStream_t stream) {
  switch (params.format) {
    case FfnFormat::kBF16: {
      const int64_t pieces = static_cast<int64_t>(params.units) * params.blocks * (kFfnWeightBytes / 16);
      PackBF16Kernel<<<static_cast<unsigned>((pieces + kThreads - 1) / kThreads), kThreads, 0, stream>>>(params);
      break;
    }
    case FfnFormat::kFP8: {
      const dim3 grid((params.columns + kScaleColumns - 1) / kScaleColumns, (params.rows + kScaleRows - 1) / kScaleRows,
                      params.second != nullptr ? 2 : 1);
      PackFP8Kernel<<<grid, kThreads, 0, stream>>>(params);
      break;
    }
  }
  return cudaGetLastError();
}

}  // namespace minke::cuda
