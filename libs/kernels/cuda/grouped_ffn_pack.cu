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
  const int64_t pieces = static_cast<int64_t>(p.units) * p.blocks * (kFfnBF16Bytes / 16);
  if (piece >= pieces) return;
  const int chunk = piece % 8, row_of_unit = piece / 8 % kFfnUnitRows;
  const int block = piece / (kFfnBF16Bytes / 16) % p.blocks, unit = piece / (kFfnBF16Bytes / 16) / p.blocks;
  const uint16_t* from = p.first;
  int row = unit * kFfnUnitRows + row_of_unit;
  if (p.second != nullptr) {
    row = unit * (kFfnUnitRows / 2) + row_of_unit / 16 * 8 + row_of_unit % 8;
    if (row_of_unit % 16 >= 8) from = p.second;
  }
  const int column = block * kFfnBlockColumns + chunk * 8;
  uint4 value = make_uint4(0, 0, 0, 0);
  if (row < p.rows && column < p.columns) {
    value = *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * p.columns + column);
  }
  uint8_t* to = p.to + (static_cast<int64_t>(unit) * p.blocks + block) * kFfnBF16Bytes;
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

  // Words of four weights: tile, part, thread, word; gate and up hold every second word.
  constexpr int kWords = kScaleRows * kScaleColumns / 4;
  const int first_unit = paired ? 2 * blockIdx.y : blockIdx.y, words = paired ? 2 : 4;
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    int at = i;
    const int word = paired ? at % 2 * 2 + blockIdx.z : at % 4;
    at /= words;
    const int thread = at % 128;
    at /= 128;
    const int part = at % 2, tile = at / 2 % 2, block_index = at / 4 % 2, unit_index = at / 8;
    const int unit = first_unit + unit_index, block = 2 * blockIdx.x + block_index;
    if (unit >= p.units || block >= p.blocks) continue;
    const int slab = tile * 4 + thread / 32, row_of_slab = thread % 32 / 4;
    const int row = paired ? unit * 64 + slab * 8 + row_of_slab
                           : unit * kFfnUnitRows + slab * 16 + row_of_slab + (word & 1) * 8;
    const int column = block * kFfnBlockColumns + (2 * part + word / 2) * 16 + 2 * (thread % 4);
    const auto quantise = [&](int offset) {
      return static_cast<uint32_t>(__nv_cvt_float_to_fp8(read(row, column + offset) / scale, __NV_SATFINITE, __NV_E4M3));
    };
    uint8_t* to = p.to + (static_cast<int64_t>(unit) * p.blocks + block) * kFfnFP8Bytes;
    *reinterpret_cast<uint32_t*>(to + (((tile * 2 + part) * 128 + thread) * 4 + word) * 4) =
        quantise(8) | quantise(0) << 8 | quantise(9) << 16 | quantise(1) << 24;
  }
  if (threadIdx.x < 4) {
    const int unit = first_unit + threadIdx.x / 2, block = 2 * blockIdx.x + threadIdx.x % 2;
    if ((threadIdx.x < 2 || paired) && unit < p.units && block < p.blocks) {
      const uint32_t factor = __bfloat16_as_ushort(__float2bfloat16(scale * 0x1p120f)) * 0x10001u;
      uint8_t* to = p.to + (static_cast<int64_t>(unit) * p.blocks + block) * kFfnFP8Bytes;
      uint32_t* factors = reinterpret_cast<uint32_t*>(to + kFfnUnitRows * kFfnBlockColumns);
      factors[blockIdx.z] = factor;
      if (!paired) factors[1] = factor;
    }
  }
}

}  // namespace

cudaError_t LaunchFfnPack(const FfnPackParams& params, cudaStream_t stream) {
  switch (params.format) {
    case FfnFormat::kBF16: {
      const int64_t pieces = static_cast<int64_t>(params.units) * params.blocks * (kFfnBF16Bytes / 16);
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
