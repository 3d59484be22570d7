#include <cuda_bf16.h>

#include <numbers>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/mla_generic.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPage = 64;

__device__ __forceinline__ float Wide(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
__device__ __forceinline__ bf16 Narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16(x)); }

// One head of one row; pages in order with a running maximum. Dynamic shared memory: query, then sums.
__global__ void __launch_bounds__(kThreads) GenericKernel(const MlaGenericArgs a, float scale_log2) {
  extern __shared__ float values[];
  __shared__ float scores[kPage];
  const int dim = a.rank + a.rope, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* query = values;
  float* sums = values + dim;
  const int64_t row = blockIdx.y, at = row * a.heads + blockIdx.x;
  const int seen = a.positions[row] + 1;
  const uint32_t* pages = a.page_table + a.sequences[row] * a.page_table_stride;
  for (int i = threadIdx.x; i < dim; i += kThreads) query[i] = Wide(a.q[at * dim + i]) * scale_log2;
  for (int i = threadIdx.x; i < a.rank; i += kThreads) sums[i] = 0;
  float maximum = -INFINITY, total = 0;
  for (int begin = 0; begin < seen; begin += kPage) {
    const bf16* page = a.cache + static_cast<int64_t>(pages[begin / kPage]) * kPage * dim;
    const int keys = min(kPage, seen - begin);
    __syncthreads();
    for (int j = warp; j < keys; j += kWarps) {
      float sum = 0;
      for (int i = lane; i < dim; i += 32) sum += query[i] * Wide(page[j * dim + i]);
#pragma unroll
      for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (lane == 0) scores[j] = sum;
    }
    __syncthreads();
    float top = maximum;
    for (int j = 0; j < keys; ++j) top = fmaxf(top, scores[j]);
    const float shrink = exp2f(maximum - top);  // 0 at first
    maximum = top;
    total *= shrink;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < keys) scores[threadIdx.x] = exp2f(scores[threadIdx.x] - top);
    __syncthreads();
    for (int j = 0; j < keys; ++j) total += scores[j];
    for (int i = threadIdx.x; i < a.rank; i += kThreads) {
      float sum = sums[i] * shrink;
      for (int j = 0; j < keys; ++j) sum += scores[j] * Wide(page[j * dim + i]);
      sums[i] = sum;
    }
  }
  for (int i = threadIdx.x; i < a.rank; i += kThreads) a.out[at * a.rank + i] = Narrow(sums[i] / total);
}

}  // namespace

absl::Status MlaGeneric(const MlaGenericArgs& a, const Stream& stream) {
  if (a.rows == 0) return absl::OkStatus();
  const int64_t values = 2 * int64_t{a.rank} + a.rope;
  if (a.heads < 1 || a.rank < 1 || a.rope < 0 || a.rank + a.rope > 8192 || a.rows > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("MlaGeneric: ", a.rows, " rows, ", a.heads, " heads, ", a.rank, " + ", a.rope));
  }
  if (values * 4 > 48 << 10) {
    MK_CUDA_RETURN_IF_ERROR(
        cudaFuncSetAttribute(GenericKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(values * 4)));
  }
  GenericKernel<<<dim3(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.rows)), kThreads,
                  static_cast<size_t>(values * 4), stream.handle()>>>(a,
                                                                      a.softmax_scale * std::numbers::log2e_v<float>);
  MK_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace minke::cuda
