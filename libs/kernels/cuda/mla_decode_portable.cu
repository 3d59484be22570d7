// MLA decode for any GPU from sm_80 on: the plain form. A block takes a worker's segments of 16 query rows; its four
// warps share a page's scores by keys and its values by columns.
#include "libs/kernels/cuda/mla_decode_kernels.h"
#include "libs/kernels/cuda/mma_sm80.cuh"

namespace minke::cuda {
namespace {

using namespace sm80;

constexpr int kThreads = 128;
constexpr int kRows = 16;
constexpr int kDim = 576, kRank = 512, kPage = 64;
constexpr int kStride = kDim + 8;   // 16-byte chunks of consecutive rows fall into different banks
constexpr int kStrideP = kPage + 8;
constexpr float kLn2 = 0.69314718056f;

struct Shared {
  uint16_t q[kRows * kStride];
  uint16_t page[kPage * kStride];
  uint16_t p[kRows * kStrideP];
  float max[4][kRows];
  float sum[4][kRows];
};

__device__ __forceinline__ void CopyRows(uint16_t* to, const uint16_t* from, int rows, int valid) {
  for (int i = threadIdx.x; i < rows * (kDim / 8); i += kThreads) {
    const int row = i / (kDim / 8), column = i % (kDim / 8) * 8;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < valid) value = *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * kDim + column);
    *reinterpret_cast<uint4*>(to + row * kStride + column) = value;
  }
}

__global__ void __launch_bounds__(kThreads) DecodeKernel(const DecodeParams p) {
  extern __shared__ __align__(16) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  for (int index = p.worker_begin[blockIdx.x]; index < p.worker_begin[blockIdx.x + 1]; ++index) {
    const DecodeSegment segment = p.segments[index];
    __syncthreads();
    CopyRows(shared.q, p.q + static_cast<int64_t>(segment.row) * kDim, kRows, segment.rows);
    const int limit_a = segment.first_limit + (segment.row_offset + row) / p.heads;
    const int limit_b = segment.first_limit + (segment.row_offset + row + 8) / p.heads;
    float m_a = -INFINITY, m_b = -INFINITY, l_a = 0, l_b = 0;
    float o[16][4] = {};
    for (int t = 0; t < segment.pages; ++t) {
      const int first = (segment.page_begin + t) * kPage;
      const int64_t page = p.page_table[segment.sequence * p.page_table_stride + segment.page_begin + t];
      __syncthreads();
      CopyRows(shared.page, p.cache + page * kPage * kDim, kPage, segment.length - first);
      __syncthreads();
      // Scores of this warp's 16 keys.
      float s[2][4] = {};
#pragma unroll 4
      for (int k = 0; k < kDim; k += 16) {
        uint32_t a[4], b[4];
        LoadMatrix4(a, shared.q + (lane & 15) * kStride + k + lane / 16 * 8);
        LoadMatrix4(b, shared.page + (warp * 16 + lane / 16 * 8 + lane % 8) * kStride + k + (lane / 8 & 1) * 8);
        Product(s[0], a, b[0], b[1]);
        Product(s[1], a, b[2], b[3]);
      }
      float to_a = -INFINITY, to_b = -INFINITY;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int key = first + warp * 16 + i * 8 + 2 * (lane & 3) + c;
          s[i][c] = key < limit_a ? s[i][c] * p.scale_log2 : -INFINITY;
          s[i][c + 2] = key < limit_b ? s[i][c + 2] * p.scale_log2 : -INFINITY;
          to_a = fmaxf(to_a, s[i][c]);
          to_b = fmaxf(to_b, s[i][c + 2]);
        }
      }
      to_a = QuadMax(to_a), to_b = QuadMax(to_b);
      if ((lane & 3) == 0) shared.max[warp][row] = to_a, shared.max[warp][row + 8] = to_b;
      __syncthreads();
      to_a = m_a, to_b = m_b;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        to_a = fmaxf(to_a, shared.max[w][row]);
        to_b = fmaxf(to_b, shared.max[w][row + 8]);
      }
      const float f_a = Relative(m_a, to_a), f_b = Relative(m_b, to_b);
      m_a = to_a, m_b = to_b;
      l_a *= f_a, l_b *= f_b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a0 = Relative(s[i][0], m_a), a1 = Relative(s[i][1], m_a);
        const float b0 = Relative(s[i][2], m_b), b1 = Relative(s[i][3], m_b);
        l_a += a0 + a1, l_b += b0 + b1;
        const int column = warp * 16 + i * 8 + 2 * (lane & 3);
        *reinterpret_cast<uint32_t*>(shared.p + row * kStrideP + column) = PackBF16(a0, a1);
        *reinterpret_cast<uint32_t*>(shared.p + (row + 8) * kStrideP + column) = PackBF16(b0, b1);
      }
      __syncthreads();
      // Values: columns 128 warp ... + 127.
#pragma unroll
      for (int i = 0; i < 16; ++i) o[i][0] *= f_a, o[i][1] *= f_a, o[i][2] *= f_b, o[i][3] *= f_b;
#pragma unroll
      for (int k = 0; k < kPage; k += 16) {
        uint32_t a[4];
        LoadMatrix4(a, shared.p + (lane & 15) * kStrideP + k + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
          uint32_t b[4];
          LoadMatrix4Transposed(b, shared.page + (k + (lane & 15)) * kStride + warp * 128 + i * 8 + lane / 16 * 8);
          Product(o[i], a, b[0], b[1]);
          Product(o[i + 1], a, b[2], b[3]);
        }
      }
    }
    l_a = QuadSum(l_a), l_b = QuadSum(l_b);
    if ((lane & 3) == 0) shared.sum[warp][row] = l_a, shared.sum[warp][row + 8] = l_b;
    __syncthreads();
    l_a = l_b = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) l_a += shared.sum[w][row], l_b += shared.sum[w][row + 8];
    const float scale[2] = {l_a > 0 ? 1.f / l_a : 0.f, l_b > 0 ? 1.f / l_b : 0.f};
    const float sum[2] = {m_a + log2f(l_a), m_b + log2f(l_b)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      if (r >= segment.rows) continue;
      const int column = warp * 128 + 2 * (lane & 3);
      const bool writes_sum = warp == 0 && (lane & 3) == 0;
      if (segment.split < 0) {
        uint16_t* out = p.out + static_cast<int64_t>(segment.row + r) * kRank + column;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          *reinterpret_cast<uint32_t*>(out + 8 * i) = PackBF16(o[i][2 * h] * scale[h], o[i][2 * h + 1] * scale[h]);
        }
        if (writes_sum && p.lse != nullptr) p.lse[segment.row + r] = sum[h] * kLn2;
      } else {
        const int64_t at = static_cast<int64_t>(segment.split) * p.item_rows + r;
        float* out = p.partials + at * kRank + column;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          *reinterpret_cast<float2*>(out + 8 * i) = make_float2(o[i][2 * h] * scale[h], o[i][2 * h + 1] * scale[h]);
        }
        if (writes_sum) p.sums[at] = sum[h];
      }
    }
  }
}

}  // namespace

cudaError_t LaunchDecodePortable(const DecodeParams& params, int workers, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(DecodeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  DecodeKernel<<<workers, kThreads, sizeof(Shared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace minke::cuda
