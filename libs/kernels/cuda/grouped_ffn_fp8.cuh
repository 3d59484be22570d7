// e4m3 weights to bf16 operands of matrix products.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace minke::cuda {

// Four e4m3 values times their factor. Bytes 1 and 3 become `a`, bytes 0 and 2 become `b`. Shifted into place, the bits
// of e4m3 are those of a bf16 2^120 times smaller; `factor` (two times the same bf16) makes up for it, exactly.
__device__ __forceinline__ void ExpandFP8(uint32_t bytes, uint32_t factor, uint32_t& a, uint32_t& b) {
  const uint32_t low = bytes << 8;
  a = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
  b = (low & 0x80008000u) | ((bytes << 4) & 0x07f007f0u);
  const __nv_bfloat162 f = *reinterpret_cast<const __nv_bfloat162*>(&factor);
  const __nv_bfloat162 x = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), f);
  const __nv_bfloat162 y = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&b), f);
  a = *reinterpret_cast<const uint32_t*>(&x);
  b = *reinterpret_cast<const uint32_t*>(&y);
}

// A thread's 16 bytes of a unit's block (grouped_ffn_kernels.h): the left operands of two 64 x 16 products.
__device__ __forceinline__ void ExpandFragments(const uint4& bytes, uint32_t gate, uint32_t up, uint32_t (&a)[8]) {
  ExpandFP8(bytes.x, gate, a[0], a[2]);
  ExpandFP8(bytes.y, up, a[1], a[3]);
  ExpandFP8(bytes.z, gate, a[4], a[6]);
  ExpandFP8(bytes.w, up, a[5], a[7]);
}

}  // namespace minke::cuda
