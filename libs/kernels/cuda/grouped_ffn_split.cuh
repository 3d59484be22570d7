// bf16 activations as sums of two e4m3 numbers, so that they can meet e4m3 weights in a product of e4m3. A bf16 has eight
// significant bits, an e4m3 four: first = e4m3(v / scale), second = e4m3(16 (v / scale - first)), and
// v = scale (first + second / 16) exactly while |v| is at least the largest magnitude under the scale / 2^14; what is smaller
// is off by at most the largest / 2^21.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

namespace minke::cuda {

// Of values of which the largest magnitude has these bits as f32: a power of two that makes it 128 to 256. NaN where that
// is not finite, so that every sum that it is part of becomes NaN.
struct SplitScale {
  float scale, inverse;
  __device__ __forceinline__ explicit SplitScale(uint32_t largest) {
    const uint32_t exponent = max(largest >> 23, 27u);
    scale = largest >= 0x7f800000u ? NAN : __uint_as_float((exponent - 7) << 23);
    inverse = __uint_as_float((261 - min(exponent, 254u)) << 23);
  }
};

// Two values that are divided by their scales already: bits 0 to 7 are the first's.
__device__ __forceinline__ void Split(float a, float b, uint32_t& first, uint32_t& second) {
  first = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const float2 back = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(first), __NV_E4M3)));
  second = __nv_cvt_float2_to_fp8x2(make_float2((a - back.x) * 16.f, (b - back.y) * 16.f), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace minke::cuda
