// One block per row. With w = exp((logit - best) / temperature), counted in units of 2^-40: top-k, top-p and the draw
// after truncation are all the same question, "where in descending order of w (ties: ascending id) does a running
// count or mass pass a target", answered by a radix descent over the bits of w, and over the ids among equals.
#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/sampling.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr float kUnit = 0x1p40f;  // 2^20 ids of weight 1 are 2^60

__device__ __forceinline__ uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
// services/attention/sampling: UniformDraw.
__device__ __forceinline__ double UniformDraw(uint64_t seed, int64_t position) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

// An id's place in descending order: smaller comes first.
struct Rank {
  uint32_t bits;  // ~ of the weight's
  uint32_t id;
};
__device__ __forceinline__ bool NotAfter(uint32_t bits, uint32_t id, const Rank& last) {
  return bits < last.bits || (bits == last.bits && id <= last.id);
}

struct Row {
  const float* logits;
  const uint8_t* allowed;
  int vocab;
  float best, temperature, floor;

  __device__ float Logit(int i) const {
    return allowed != nullptr && allowed[i] == 0 ? -INFINITY : logits[i];
  }
  // 0: not a candidate.
  __device__ float Weight(int i) const {
    const float w = expf((Logit(i) - best) / temperature);
    return w < floor ? 0.f : w;
  }
};

__device__ __forceinline__ unsigned long long Units(float w) {
  return static_cast<unsigned long long>(static_cast<double>(w) * static_cast<double>(kUnit));
}

struct Shared {
  unsigned long long bins[kBins];
  unsigned long long warps[kWarps];
  unsigned long long target;
  uint32_t prefix;
  uint64_t best[kWarps];
};

__device__ unsigned long long BlockSum(unsigned long long x, Shared& s) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.warps[threadIdx.x / 32] = x;
  __syncthreads();
  unsigned long long sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += s.warps[w];
  return sum;
}

// Descends through four bytes of key(i): finds the key of the first candidate at which the running measure exceeds
// `target`, and leaves in s.target what the target is among the candidates of just that key.
template <class KeyOf, class MeasureOf>
__device__ uint32_t Descend(int vocab, unsigned long long target, KeyOf key, MeasureOf measure, Shared& s) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads) s.bins[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      const unsigned long long m = measure(i);
      if (m == 0) continue;
      const uint32_t k = key(i);
      if (shift < 24 && (k >> (shift + 8)) != (prefix >> (shift + 8))) continue;
      atomicAdd(&s.bins[k >> shift & 255], m);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned long long left = target;
      int b = 0, last = 0;
      for (; b < kBins; ++b) {
        if (s.bins[b] == 0) continue;
        last = b;
        if (left < s.bins[b]) break;
        left -= s.bins[b];
      }
      if (b == kBins) {  // the target lies past everything: the last there is
        b = last;
        left = s.bins[b] - 1;
      }
      s.prefix = prefix | static_cast<uint32_t>(b) << shift;
      s.target = left;
    }
    __syncthreads();
    prefix = s.prefix;
    target = s.target;
  }
  return prefix;
}

// The first id in descending order at which the running measure exceeds `target`, among candidates up to `last`.
template <class MeasureOf>
__device__ Rank Select(const Row& row, unsigned long long target, const Rank& last, MeasureOf measure, Shared& s) {
  const auto among = [&](int i, float w) { return w > 0 && NotAfter(~__float_as_uint(w), i, last); };
  const uint32_t bits = Descend(
      row.vocab, target, [&](int i) { return ~__float_as_uint(row.Weight(i)); },
      [&](int i) {
        const float w = row.Weight(i);
        return among(i, w) ? measure(w) : 0ull;
      },
      s);
  const unsigned long long rest = s.target;
  const uint32_t id = Descend(
      row.vocab, rest, [](int i) { return static_cast<uint32_t>(i); },
      [&](int i) {
        const float w = row.Weight(i);
        return ~__float_as_uint(w) == bits && among(i, w) ? measure(w) : 0ull;
      },
      s);
  return {bits, id};
}

__device__ uint64_t ArgMaxKey(float x, int i) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(i);
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const SampleArgs a) {
  __shared__ Shared s;
  const SampleRow params = a.params[blockIdx.x];
  Row row = {a.logits + blockIdx.x * a.vocab, a.allowed, static_cast<int>(a.vocab), 0, params.temperature,
             fmaxf(params.min_p, 0.f)};
  uint64_t key = 0;
  bool failed = false;
  for (int i = threadIdx.x; i < row.vocab; i += kThreads) {
    const bool may = a.allowed == nullptr || a.allowed[i] != 0;
    failed = failed || isnan(row.logits[i]);
    if (may) key = max(key, ArgMaxKey(row.logits[i], i));
  }
  if (__syncthreads_or(failed)) {
    if (threadIdx.x == 0) a.tokens[blockIdx.x] = kNoToken;
    return;
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) key = max(key, __shfl_xor_sync(~0u, key, i));
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = key;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) key = max(key, s.best[w]);
  const uint32_t best = key == 0 ? 0 : ~static_cast<uint32_t>(key);
  row.best = row.logits[best];
  if (!(params.temperature > 0) || !isfinite(row.best)) {
    if (threadIdx.x == 0) a.tokens[blockIdx.x] = best;
    return;
  }

  const auto mass = [](float w) { return max(Units(w), 1ull); };
  const auto one = [](float) { return 1ull; };
  Rank last = {~0u, ~0u};
  const auto total_up_to = [&] {
    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < row.vocab; i += kThreads) {
      const float w = row.Weight(i);
      if (w > 0 && NotAfter(~__float_as_uint(w), i, last)) sum += mass(w);
    }
    return BlockSum(sum, s);
  };
  // top-k first, then top-p of what it left.
  bool truncated = params.top_p < 1;
  if (params.top_k > 0 && params.top_k < static_cast<uint32_t>(row.vocab)) {
    unsigned long long mine = 0;
    for (int i = threadIdx.x; i < row.vocab; i += kThreads) mine += row.Weight(i) > 0 ? 1 : 0;
    if (params.top_k < BlockSum(mine, s)) {
      truncated = true;
      last = Select(row, params.top_k - 1, last, one, s);
    }
  }
  if (params.top_p < 1) {
    // The first id at which the mass reaches top_p of the total: exceeds what is just below it.
    const double wanted = ceil(static_cast<double>(fmaxf(params.top_p, 0.f)) * static_cast<double>(total_up_to()));
    last = Select(row, wanted < 1 ? 0 : static_cast<unsigned long long>(wanted) - 1, last, mass, s);
  }
  const unsigned long long total = total_up_to();
  const unsigned long long target =
      min(static_cast<unsigned long long>(UniformDraw(params.seed, params.position) * static_cast<double>(total)),
          total - 1);
  uint32_t token;
  if (truncated) {
    token = Select(row, target, last, mass, s).id;
  } else {  // in order of ids, as the host draws when nothing was sorted
    token = Descend(
        row.vocab, target, [](int i) { return static_cast<uint32_t>(i); },
        [&](int i) {
          const float w = row.Weight(i);
          return w > 0 ? mass(w) : 0ull;
        },
        s);
  }
  if (threadIdx.x == 0) a.tokens[blockIdx.x] = token;
}

}  // namespace

absl::Status SampleTokens(const SampleArgs& args, const Stream& stream) {
  if (args.rows == 0) return absl::OkStatus();
  if (args.vocab < 1 || args.vocab > 1 << 20) {
    return absl::InvalidArgumentError(absl::StrCat("SampleTokens: ", args.vocab, " ids"));
  }
  SampleKernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream.handle()>>>(args);
  MK_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace minke::cuda
