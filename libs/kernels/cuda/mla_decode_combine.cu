// Adds up the partial results of items that were cut: out = sum_i w_i partial_i, w_i = 2^(sum_i - max) / total.
#include <cuda_bf16.h>

#include <cmath>

#include "libs/kernels/cuda/mla_decode_kernels.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDim = 512;
constexpr float kLn2 = 0.69314718056f;

// A row's 512 columns are 4 x 128: lane l holds columns 128 i + 4 l ... + 3.
struct Row {
  float4 v[4];
};

__device__ __forceinline__ void Store(uint16_t* out, const Row& row, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(row.v[i].x, row.v[i].y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(row.v[i].z, row.v[i].w);
    uint2 packed;
    packed.x = *reinterpret_cast<const uint32_t*>(&low);
    packed.y = *reinterpret_cast<const uint32_t*>(&high);
    *reinterpret_cast<uint2*>(out + 128 * i + 4 * lane) = packed;
  }
}

// Warp `first` of `step` that share a row: its partials first, first + step, ...
__device__ __forceinline__ void Accumulate(const CombineParams& p, const DecodeCombine& c, int r, int first, int step,
                                           float max, int lane, Row& row, float& total) {
  total = 0;
  row = {};
#pragma unroll 4
  for (int i = first; i < c.splits; i += step) {
    const int64_t at = static_cast<int64_t>(c.split_begin + i) * p.item_rows + r;
    const float weight = exp2f(p.sums[at] - max);
    const float4* from = reinterpret_cast<const float4*>(p.partials + at * kDim) + lane;
    total += weight;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 x = __ldcg(from + 32 * k);
      if (weight > 0) {  // an empty partial holds nothing
        row.v[k].x += weight * x.x;
        row.v[k].y += weight * x.y;
        row.v[k].z += weight * x.z;
        row.v[k].w += weight * x.w;
      }
    }
  }
}

__device__ __forceinline__ float Max(const CombineParams& p, const DecodeCombine& c, int r, int lane) {
  float max = -INFINITY;
  for (int i = lane; i < c.splits; i += 32) {
    max = fmaxf(max, p.sums[static_cast<int64_t>(c.split_begin + i) * p.item_rows + r]);
  }
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
  return max;
}

template <bool kOverlapped>
__global__ void __launch_bounds__(kThreads) CombineKernel(CombineParams p) {
#if __CUDA_ARCH__ >= 900
  if (kOverlapped) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = p.header[0], warps_per_row = p.header[1];
  if (warps_per_row == 1) {
    const int per_item = (p.item_rows + kWarps - 1) / kWarps;
    for (int unit = blockIdx.x; unit < count * per_item; unit += gridDim.x) {
      const DecodeCombine c = p.combines[unit / per_item];
      const int r = unit % per_item * kWarps + warp;
      if (r >= c.rows) continue;
      const float max = Max(p, c, r, lane);
      Row row;
      float total;
      Accumulate(p, c, r, 0, 1, max, lane, row, total);
      const float inverse = 1.f / total;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        row.v[k].x *= inverse, row.v[k].y *= inverse, row.v[k].z *= inverse, row.v[k].w *= inverse;
      }
      Store(p.out + static_cast<int64_t>(c.row + r) * kDim, row, lane);
      if (lane == 0 && p.lse != nullptr) p.lse[c.row + r] = (max + log2f(total)) * kLn2;
    }
    return;
  }
  __shared__ float4 rows[kWarps][kDim / 4];
  __shared__ float totals[kWarps];
  for (int unit = blockIdx.x; unit < count * p.item_rows; unit += gridDim.x) {
    const DecodeCombine c = p.combines[unit / p.item_rows];
    const int r = unit % p.item_rows;
    if (r >= c.rows) continue;  // the same for the whole block
    const float max = Max(p, c, r, lane);
    Row row;
    float total;
    Accumulate(p, c, r, warp, kWarps, max, lane, row, total);
#pragma unroll
    for (int k = 0; k < 4; ++k) rows[warp][32 * k + lane] = row.v[k];
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += totals[w];
    const float inverse = 1.f / total;
    // 256 threads, two columns each.
    const float* columns = reinterpret_cast<const float*>(rows) + 2 * threadIdx.x;
    float x = 0, y = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      x += columns[w * kDim];
      y += columns[w * kDim + 1];
    }
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x * inverse, y * inverse);
    *reinterpret_cast<__nv_bfloat162*>(p.out + static_cast<int64_t>(c.row + r) * kDim + 2 * threadIdx.x) = packed;
    if (threadIdx.x == 0 && p.lse != nullptr) p.lse[c.row + r] = (max + log2f(total)) * kLn2;
    __syncthreads();
  }
}

}  // namespace

cudaError_t LaunchDecodeCombine(const CombineParams& params, int blocks, bool overlapped, cudaStream_t stream) {
  if (!overlapped) {
    CombineKernel<false><<<blocks, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, CombineKernel<true>, params);
}

}  // namespace minke::cuda
