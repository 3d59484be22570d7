// Naive MLA prefill for any GPU from sm_80 on: the plain form. A block computes 64 queries of one head, 16 a warp.
#include "libs/kernels/cuda/mla_prefill_kernels.h"
#include "libs/kernels/cuda/mma_sm80.cuh"

namespace minke::cuda {
namespace {

using namespace sm80;

constexpr int kThreads = 128;
constexpr int kRows = kPrefillPortableTileRows, kKeys = 64;
constexpr int kNope = 128, kRope = 64, kDim = kNope + kRope, kValue = 128;
constexpr int kStrideK = kDim + 8, kStrideV = kValue + 8;

struct Shared {
  uint16_t q[kRows * kStrideK];
  uint16_t k[kKeys * kStrideK];
  uint16_t v[kKeys * kStrideV];
};

// kWidth columns of up to 64 rows; rows from `valid` on become zero.
template <int kWidth>
__device__ __forceinline__ void CopyRows(uint16_t* to, int stride, const uint16_t* from, int64_t row_stride, int valid) {
  for (int i = threadIdx.x; i < 64 * (kWidth / 8); i += kThreads) {
    const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < valid) value = *reinterpret_cast<const uint4*>(from + row * row_stride + column);
    *reinterpret_cast<uint4*>(to + row * stride + column) = value;
  }
}

__global__ void __launch_bounds__(kThreads) PrefillKernel(const PrefillParams p) {
  extern __shared__ __align__(16) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x;
  int at = 0;
  while (at + 1 < p.span_count && p.spans[at + 1].tile_begin <= tile) ++at;
  const PrefillSpan span = p.spans[at];
  const int per_head = (span.queries + kRows - 1) / kRows, local = tile - span.tile_begin;
  const int first = (per_head - 1 - local % per_head) * kRows, head = local / per_head;
  const int rows = min(kRows, span.queries - first);
  const int limit = span.keys - span.queries + first + 1;  // keys the first row sees
  const int row = warp * 16 + lane / 4, limit_a = limit + row, limit_b = limit_a + 8;

  const int64_t q_row = static_cast<int64_t>(p.heads) * kDim;
  CopyRows<kDim>(shared.q, kStrideK, p.q + (span.query_begin + first) * q_row + head * kDim, q_row, rows);
  float m_a = -INFINITY, m_b = -INFINITY, l_a = 0, l_b = 0;
  float o[16][4] = {};
  for (int key = 0; key < limit + rows - 1; key += kKeys) {
    const int64_t from = span.key_begin + key;
    const int valid = span.keys - key;
    __syncthreads();
    CopyRows<kNope>(shared.k, kStrideK, p.k.data + from * p.k.row + head * p.k.head, p.k.row, valid);
    CopyRows<kRope>(shared.k + kNope, kStrideK, p.k_rope.data + from * p.k_rope.row + head * p.k_rope.head, p.k_rope.row,
                    valid);
    CopyRows<kValue>(shared.v, kStrideV, p.v.data + from * p.v.row + head * p.v.head, p.v.row, valid);
    __syncthreads();
    float s[8][4] = {};
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t a[4];
      LoadMatrix4(a, shared.q + (warp * 16 + (lane & 15)) * kStrideK + k + lane / 16 * 8);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        uint32_t b[4];
        LoadMatrix4(b, shared.k + (i * 8 + lane / 16 * 8 + lane % 8) * kStrideK + k + (lane / 8 & 1) * 8);
        Product(s[i], a, b[0], b[1]);
        Product(s[i + 1], a, b[2], b[3]);
      }
    }
    float to_a = m_a, to_b = m_b;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = key + i * 8 + 2 * (lane & 3) + c;
        s[i][c] = column < limit_a ? s[i][c] * p.scale_log2 : -INFINITY;
        s[i][c + 2] = column < limit_b ? s[i][c + 2] * p.scale_log2 : -INFINITY;
        to_a = fmaxf(to_a, s[i][c]);
        to_b = fmaxf(to_b, s[i][c + 2]);
      }
    }
    to_a = QuadMax(to_a), to_b = QuadMax(to_b);
    const float f_a = Relative(m_a, to_a), f_b = Relative(m_b, to_b);
    m_a = to_a, m_b = to_b;
    l_a *= f_a, l_b *= f_b;
#pragma unroll
    for (int i = 0; i < 16; ++i) o[i][0] *= f_a, o[i][1] *= f_a, o[i][2] *= f_b, o[i][3] *= f_b;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s[i][0] = Relative(s[i][0], m_a), s[i][1] = Relative(s[i][1], m_a);
      s[i][2] = Relative(s[i][2], m_b), s[i][3] = Relative(s[i][3], m_b);
      l_a += s[i][0] + s[i][1], l_b += s[i][2] + s[i][3];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t a[4] = {PackBF16(s[2 * k][0], s[2 * k][1]), PackBF16(s[2 * k][2], s[2 * k][3]),
                             PackBF16(s[2 * k + 1][0], s[2 * k + 1][1]), PackBF16(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        uint32_t b[4];
        LoadMatrix4Transposed(b, shared.v + (k * 16 + (lane & 15)) * kStrideV + i * 8 + lane / 16 * 8);
        Product(o[i], a, b[0], b[1]);
        Product(o[i + 1], a, b[2], b[3]);
      }
    }
  }
  l_a = QuadSum(l_a), l_b = QuadSum(l_b);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
    if (r >= rows) continue;
    const float l = h ? l_b : l_a, scale = 1.f / l;
    const int64_t to = static_cast<int64_t>(span.query_begin + first + r) * p.heads + head;
    uint16_t* out = p.out + to * kValue + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      *reinterpret_cast<uint32_t*>(out + 8 * i) = PackBF16(o[i][2 * h] * scale, o[i][2 * h + 1] * scale);
    }
    if ((lane & 3) == 0 && p.lse != nullptr) p.lse[to] = ((h ? m_b : m_a) + log2f(l)) * 0.69314718056f;
  }
}

}  // namespace

cudaError_t LaunchPrefillPortable(const PrefillParams& params, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(PrefillKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  PrefillKernel<<<params.tiles, kThreads, sizeof(Shared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace minke::cuda
