#include "bench/gpu/fill.h"

#include <cuda_bf16.h>

namespace minke::bench {
namespace {

__device__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

__global__ void FillKernel(__nv_bfloat16* data, int64_t count, uint32_t seed, float deviation) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint32_t a = Mix(static_cast<uint32_t>(i) ^ Mix(seed ^ static_cast<uint32_t>(i >> 32))), b = Mix(a ^ 0x9e3779b9u);
    const float radius = sqrtf(-2.f * __logf((a + 1.f) * 0x1p-32f)), angle = b * (6.2831853f * 0x1p-32f);
    data[i] = __float2bfloat16(deviation * radius * __cosf(angle));
  }
}

}  // namespace

absl::Status FillNormal(bf16* data, int64_t count, uint32_t seed, float deviation, const cuda::Stream& stream) {
  FillKernel<<<2048, 256, 0, stream.handle()>>>(reinterpret_cast<__nv_bfloat16*>(data), count, seed, deviation);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(error));
}

}  // namespace minke::bench
