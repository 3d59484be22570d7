#include <cuda_bf16.h>

#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/rows.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Eight {
  float v[8];
};

__device__ __forceinline__ Eight Widen(const uint4& packed) {
  Eight out;
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[2 * i] = __uint_as_float(words[i] << 16);
    out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return out;
}
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ uint4 Narrow(const Eight& x) {
  return make_uint4(Pack(x.v[0], x.v[1]), Pack(x.v[2], x.v[3]), Pack(x.v[4], x.v[5]), Pack(x.v[6], x.v[7]));
}
__device__ __forceinline__ Eight LoadEight(const bf16* from) { return Widen(*reinterpret_cast<const uint4*>(from)); }
__device__ __forceinline__ void StoreEight(bf16* to, const Eight& x) { *reinterpret_cast<uint4*>(to) = Narrow(x); }
__device__ __forceinline__ Eight LoadEight(const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ __forceinline__ void StoreEight(float* to, const Eight& x) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

// The block's sum, in every thread. Every call needs its own `shared` or a barrier between.
__device__ __forceinline__ float BlockSum(float x, float* shared) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    EmbedKernel(const bf16* table, int64_t vocab, const uint32_t* tokens, int64_t hidden, float* x) {
  const int64_t token = min(static_cast<int64_t>(tokens[blockIdx.x]), vocab - 1);
  for (int64_t i = 8 * threadIdx.x; i < hidden; i += 8 * kThreads) {
    StoreEight(x + blockIdx.x * hidden + i, LoadEight(table + token * hidden + i));
  }
}

__global__ void AnglesKernel(const double* inv_freq, double magnitude, int half, const int32_t* positions,
                             int64_t count, float* cos_sin) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / half;
  const int pair = static_cast<int>(i % half);
  double sine, cosine;
  sincos(static_cast<double>(positions[row]) * inv_freq[pair], &sine, &cosine);
  cos_sin[row * 2 * half + pair] = static_cast<float>(cosine * magnitude);
  cos_sin[row * 2 * half + half + pair] = static_cast<float>(sine * magnitude);
}

// Rows up to kThreads * 8 * kKept wide stay in registers between the two passes, wider ones are read again.
constexpr int kKept = 3;

__global__ void __launch_bounds__(kThreads) NormKernel(const NormArgs a) {
  __shared__ float shared[kWarps];
  const int64_t from = a.select == nullptr ? static_cast<int64_t>(blockIdx.x) : a.select[blockIdx.x];
  float* x = a.x + from * a.width;
  const bf16* add = a.add == nullptr ? nullptr : a.add + from * a.width;
  bf16* out = a.out + blockIdx.x * a.width;
  const auto load = [&](int64_t i) {
    Eight v = LoadEight(x + i);
    if (add != nullptr) {
      const Eight more = LoadEight(add + i);
#pragma unroll
      for (int k = 0; k < 8; ++k) v.v[k] += more.v[k];
    }
    return v;
  };
  Eight kept[kKept];
  float sum = 0;
  const auto take = [&](int64_t i, const Eight& v) {
    if (add != nullptr && a.select == nullptr) StoreEight(x + i, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v.v[k] * v.v[k];
  };
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    const int64_t i = 8 * (threadIdx.x + j * kThreads);
    if (i < a.width) take(i, kept[j] = load(i));
  }
  const int64_t rest = 8 * (threadIdx.x + kKept * kThreads);
  for (int64_t i = rest; i < a.width; i += 8 * kThreads) take(i, load(i));
  const float scale = rsqrtf(BlockSum(sum, shared) / static_cast<float>(a.width) + a.eps);
  const auto put = [&](int64_t i, Eight v) {
    const Eight w = LoadEight(a.weight + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) v.v[k] = v.v[k] * scale * w.v[k];
    StoreEight(out + i, v);
  };
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    const int64_t i = 8 * (threadIdx.x + j * kThreads);
    if (i < a.width) put(i, kept[j]);
  }
  for (int64_t i = rest; i < a.width; i += 8 * kThreads) {
    put(i, a.select == nullptr ? LoadEight(x + i) : load(i));  // with the sum already written back, or not
  }
}

__device__ __forceinline__ void NormInto(const bf16* from, int width, const float* weight, float eps, bf16* out,
                                         float* shared) {
  float sum = 0;
  for (int i = 8 * threadIdx.x; i < width; i += 8 * kThreads) {
    const Eight v = LoadEight(from + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v.v[k] * v.v[k];
  }
  const float scale = rsqrtf(BlockSum(sum, shared) / static_cast<float>(width) + eps);
  for (int i = 8 * threadIdx.x; i < width; i += 8 * kThreads) {
    Eight v = LoadEight(from + i);
    const Eight w = LoadEight(weight + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) v.v[k] = v.v[k] * scale * w.v[k];
    StoreEight(out + i, v);
  }
}

// Four adjacent pairs at once.
__device__ __forceinline__ void Rotate(const bf16* from, bf16* to, const float* cos_sin, int half, int i) {
  Eight v = LoadEight(from + i);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float c = cos_sin[i / 2 + k], s = cos_sin[half + i / 2 + k], even = v.v[2 * k], odd = v.v[2 * k + 1];
    v.v[2 * k] = even * c - odd * s;
    v.v[2 * k + 1] = even * s + odd * c;
  }
  StoreEight(to + i, v);
}

constexpr int kQueryEights = 4 * kThreads;  // eights of queries per block

// blockIdx.y 0: the latent (if any); the rest: the queries.
__global__ void __launch_bounds__(kThreads)
    LatentAndQueryKernel(const LatentArgs a, const QueryArgs b, int latent_blocks) {
  __shared__ float shared[2][kWarps];
  const int64_t row = blockIdx.x;
  if (static_cast<int>(blockIdx.y) < latent_blocks) {
    const bf16* from = a.qkv + row * a.qkv_row;
    if (a.q_rank > 0) NormInto(from, a.q_rank, a.q_norm, a.eps, a.q_compressed + row * a.q_rank, shared[0]);
    const int64_t slot = static_cast<int64_t>(a.pages[row]) * 64 + a.positions[row] % 64;
    bf16* to = a.cache + slot * (a.rank + a.rope);
    from += a.latent_offset;
    NormInto(from, a.rank, a.latent_norm, a.eps, to, shared[1]);
    for (int i = 8 * threadIdx.x; i < a.rope; i += 8 * kThreads) {
      Rotate(from + a.rank, to + a.rank, a.cos_sin + row * a.rope, a.rope / 2, i);
    }
    return;
  }
  const int width = b.nope_copy == nullptr ? b.rope : b.nope + b.rope, count = b.heads * (width / 8);
  const int begin = (static_cast<int>(blockIdx.y) - latent_blocks) * kQueryEights;
  for (int e = begin + static_cast<int>(threadIdx.x); e < min(count, begin + kQueryEights); e += kThreads) {
    const int head = e / (width / 8), i = e % (width / 8) * 8;
    const bf16* from = b.q + row * b.q_row + head * (b.nope + b.rope);
    const int64_t to = row * b.rotated_row + head * b.rotated_head;
    if (i < b.rope) {
      Rotate(from + b.nope, b.rotated + to, b.cos_sin + row * b.rope, b.rope / 2, i);
    } else {
      *reinterpret_cast<uint4*>(b.nope_copy + to + i - b.rope) = *reinterpret_cast<const uint4*>(from + i - b.rope);
    }
  }
}

__global__ void __launch_bounds__(kThreads) GatherKernel(const GatherArgs a) {
  const int64_t s = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * 64;
  const int64_t valid = min(static_cast<int64_t>(64), a.keys[s] - first);
  if (valid <= 0) return;
  const bf16* from = a.cache + static_cast<int64_t>(a.page_table[s * a.stride + blockIdx.x]) * 64 * a.width;
  bf16* to = a.out + (a.key_begin[s] + first) * a.width;
  for (int64_t i = 8 * threadIdx.x; i < valid * a.width; i += 8 * kThreads) {
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  }
}

__global__ void __launch_bounds__(kThreads)
    SwiGluKernel(const bf16* gate_up, int64_t eights, int64_t inner, bf16* out) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= eights) return;
  const int64_t row = 8 * e / inner, i = 8 * e % inner;
  Eight gate = LoadEight(gate_up + row * 2 * inner + i);
  const Eight up = LoadEight(gate_up + row * 2 * inner + inner + i);
#pragma unroll
  for (int k = 0; k < 8; ++k) gate.v[k] = gate.v[k] / (1.f + __expf(-gate.v[k])) * up.v[k];
  StoreEight(out + 8 * e, gate);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    AddPartialKernel(float* x, int64_t width, const int32_t* begin, const T* partials) {
  const int64_t row = blockIdx.x;
  for (int64_t i = 8 * threadIdx.x; i < width; i += 8 * kThreads) {
    Eight sum = LoadEight(x + row * width + i);
    for (int64_t p = begin[row]; p < begin[row + 1]; ++p) {
      const Eight more = LoadEight(partials + p * width + i);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum.v[k] += more.v[k];
    }
    StoreEight(x + row * width + i, sum);
  }
}

absl::Status Launched() {
  MK_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

unsigned Blocks(int64_t work, int64_t per_block) { return static_cast<unsigned>((work + per_block - 1) / per_block); }

}  // namespace

absl::Status EmbedRows(const bf16* table, int64_t vocab, const uint32_t* tokens, int64_t rows, int64_t hidden, float* x,
                       const Stream& stream) {
  if (rows == 0) return absl::OkStatus();
  EmbedKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream.handle()>>>(table, vocab, tokens, hidden, x);
  return Launched();
}

absl::Status RotaryAngles(const double* inv_freq, double magnitude, int64_t half, const int32_t* positions,
                          int64_t rows, float* cos_sin, const Stream& stream) {
  if (rows == 0) return absl::OkStatus();
  AnglesKernel<<<Blocks(rows * half, kThreads), kThreads, 0, stream.handle()>>>(
      inv_freq, magnitude, static_cast<int>(half), positions, rows * half, cos_sin);
  return Launched();
}

absl::Status NormRows(const NormArgs& args, const Stream& stream) {
  if (args.rows == 0) return absl::OkStatus();
  NormKernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream.handle()>>>(args);
  return Launched();
}

absl::Status LatentAndQueryRows(const LatentArgs* latent, const QueryArgs* query, int64_t rows, const Stream& stream) {
  if (rows == 0 || (latent == nullptr && query == nullptr)) return absl::OkStatus();
  const int latent_blocks = latent != nullptr ? 1 : 0;
  unsigned blocks = latent_blocks;
  if (query != nullptr) {
    const int64_t width = query->nope_copy == nullptr ? query->rope : query->nope + query->rope;
    blocks += Blocks(query->heads * (width / 8), kQueryEights);
  }
  LatentAndQueryKernel<<<dim3(static_cast<unsigned>(rows), blocks), kThreads, 0, stream.handle()>>>(
      latent != nullptr ? *latent : LatentArgs(), query != nullptr ? *query : QueryArgs(), latent_blocks);
  return Launched();
}

absl::Status GatherLatents(const GatherArgs& args, const Stream& stream) {
  if (args.sequences == 0 || args.pages_max == 0) return absl::OkStatus();
  GatherKernel<<<dim3(static_cast<unsigned>(args.pages_max), static_cast<unsigned>(args.sequences)), kThreads, 0,
                 stream.handle()>>>(args);
  return Launched();
}

absl::Status SwiGluRows(const bf16* gate_up, int64_t rows, int64_t inner, bf16* out, const Stream& stream) {
  if (rows == 0) return absl::OkStatus();
  const int64_t eights = rows * inner / 8;
  SwiGluKernel<<<Blocks(eights, kThreads), kThreads, 0, stream.handle()>>>(gate_up, eights, inner, out);
  return Launched();
}

absl::Status AddPartialRows(float* x, int64_t rows, int64_t width, const int32_t* begin, const bf16* partials,
                            const Stream& stream) {
  if (rows == 0) return absl::OkStatus();
  AddPartialKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream.handle()>>>(x, width, begin, partials);
  return Launched();
}

absl::Status AddPartialRows(float* x, int64_t rows, int64_t width, const int32_t* begin, const float* partials,
                            const Stream& stream) {
  if (rows == 0) return absl::OkStatus();
  AddPartialKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream.handle()>>>(x, width, begin, partials);
  return Launched();
}

}  // namespace minke::cuda
