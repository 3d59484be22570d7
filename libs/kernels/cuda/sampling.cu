// One block per row. With z = (best - logit) / temperature and w = exp(-z), counted in units of 2^-40: top-k, top-p and
// the draw after truncation are the same question, "at which id, in descending order of w (ties: ascending id), does a
// running count or mass pass a target". A histogram over z answers it up to a bin, sorting the bin's ids answers the
// rest. A bin of more ids than fit (many equal logits) is searched digit by digit instead.
#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/sampling.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;     // a thread per bin
constexpr float kBinsPerUnit = 32;  // of z: the last bin begins at w = 1e-14
constexpr int kListMax = 2 * kThreads;
constexpr int kDigits = 256;
constexpr int kVocabMax = 1 << 18;
constexpr float kUnit = 0x1p40f;  // 2^18 ids of weight 1 are 2^58

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

struct Row {
  const float* logits;
  const uint8_t* allowed;
  int vocab;
  float best, temperature, floor, bins_per_logit;

  // body(id, logit) for the ids of this thread, -inf where not allowed; four loads of four at a time.
  template <class Body>
  __device__ void ForEach(Body body) const {
    const auto one = [&](int i, float x) { body(i, allowed != nullptr && allowed[i] == 0 ? -INFINITY : x); };
    if (vocab % 4 != 0) {
      for (int i = threadIdx.x; i < vocab; i += kThreads) one(i, logits[i]);
      return;
    }
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < vocab; i += 4 * kThreads) {
      const float4 x = *reinterpret_cast<const float4*>(logits + i);
      one(i, x.x), one(i + 1, x.y), one(i + 2, x.z), one(i + 3, x.w);
    }
  }
  __device__ float Logit(int i) const { return allowed != nullptr && allowed[i] == 0 ? -INFINITY : logits[i]; }
  // 0: not a candidate.
  __device__ float Weight(float logit) const {
    const float w = expf((logit - best) / temperature);
    return w < floor ? 0.f : w;
  }
  __device__ int Bin(float logit) const { return static_cast<int>(fminf((best - logit) * bins_per_logit, kBins - 1)); }
};

using Mass = unsigned long long;

__device__ __forceinline__ Mass Units(float w) {
  return max(static_cast<Mass>(static_cast<double>(w) * static_cast<double>(kUnit)), Mass{1});
}

struct Shared {
  uint32_t counts[kBins];
  // Masses in pieces of 14 bits: 64-bit additions in shared memory are loops, and no piece overflows 2^18 times.
  uint32_t pieces[3][kBins];
  Mass count_before[kBins + 1], mass_before[kBins + 1];
  uint64_t list[kListMax];  // ~weight, id: ascending is the order above
  Mass digits[kDigits];
  Mass warps[kWarps];
  uint64_t best[kWarps];
  Mass found_rest, found_through;
  uint32_t found, list_size;
};

__device__ Mass BlockSum(Mass x, Shared& s) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.warps[threadIdx.x / 32] = x;
  __syncthreads();
  Mass sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += s.warps[w];
  return sum;
}

// What the threads before this one have.
__device__ Mass BlockScan(Mass x, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Mass sum = x;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const Mass before = __shfl_up_sync(~0u, sum, i);
    if (lane >= i) sum += before;
  }
  __syncthreads();
  if (lane == 31) s.warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += s.warps[w];
  return sum - x;
}

__device__ void Histogram(const Row& row, Shared& s) {
  s.counts[threadIdx.x] = 0;
#pragma unroll
  for (auto& piece : s.pieces) piece[threadIdx.x] = 0;
  __syncthreads();
  row.ForEach([&](int, float logit) {
    const float w = row.Weight(logit);
    if (!(w > 0)) return;
    const int bin = row.Bin(logit);
    const Mass units = Units(w);
    atomicAdd(&s.counts[bin], 1u);
    atomicAdd(&s.pieces[0][bin], static_cast<uint32_t>(units & 0x3fff));
    if (units >> 14 & 0x3fff) atomicAdd(&s.pieces[1][bin], static_cast<uint32_t>(units >> 14 & 0x3fff));
    if (units >> 28) atomicAdd(&s.pieces[2][bin], static_cast<uint32_t>(units >> 28));
  });
  __syncthreads();
  const int b = threadIdx.x;
  const Mass mass =
      (static_cast<Mass>(s.pieces[2][b]) << 28) + (static_cast<Mass>(s.pieces[1][b]) << 14) + s.pieces[0][b];
  s.count_before[b] = BlockScan(s.counts[b], s);
  s.mass_before[b] = BlockScan(mass, s);
  if (b == kBins - 1) {
    s.count_before[kBins] = s.count_before[b] + s.counts[b];
    s.mass_before[kBins] = s.mass_before[b] + mass;
  }
  __syncthreads();
}

// Four digits of key(id, logit), the highest first: the key of the first candidate at which the running measure exceeds
// `target`; s.found_rest becomes what is left of the target among the candidates of just that key.
template <class KeyOf, class MeasureOf>
__device__ uint32_t Descend(const Row& row, Mass target, KeyOf key, MeasureOf measure, Shared& s) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (threadIdx.x < kDigits) s.digits[threadIdx.x] = 0;
    __syncthreads();
    row.ForEach([&](int i, float logit) {
      const Mass m = measure(logit);
      if (m == 0) return;
      const uint32_t k = key(i, logit);
      if (shift < 24 && (k >> (shift + 8)) != (prefix >> (shift + 8))) return;
      atomicAdd(&s.digits[k >> shift & 255], m);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      Mass left = target;
      uint32_t digit = 0;
      while (digit < kDigits - 1 && left >= s.digits[digit]) left -= s.digits[digit++];
      s.found = prefix | digit << shift;
      s.found_rest = left;
    }
    __syncthreads();
    prefix = s.found;
    target = s.found_rest;
  }
  return prefix;
}

struct Place {
  uint32_t id;
  Mass through;  // mass of the candidates up to and including it
};

__device__ void SortList(Shared& s, int size) {
  int width = 2;
  while (width < size) width *= 2;
  for (int i = size + threadIdx.x; i < width; i += kThreads) s.list[i] = ~uint64_t{0};
  for (int run = 2; run <= width; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < width / 2; i += kThreads) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const uint64_t a = s.list[low], b = s.list[high];
        if ((a > b) == ((low & run) == 0)) s.list[low] = b, s.list[high] = a;
      }
    }
  }
  __syncthreads();
}

// The first candidate at which the running count (by_count) or mass exceeds `target`, which must be below the whole's.
__device__ Place Locate(const Row& row, Mass target, bool by_count, Shared& s) {
  const Mass* before = by_count ? s.count_before : s.mass_before;
  __syncthreads();
  if (before[threadIdx.x] <= target && target < before[threadIdx.x + 1]) s.found = threadIdx.x;
  if (threadIdx.x == 0) s.list_size = 0;
  __syncthreads();
  const int bin = static_cast<int>(s.found), size = static_cast<int>(s.counts[bin]);
  const Mass rest = target - before[bin], mass_before = s.mass_before[bin];
  if (size <= kListMax) {
    row.ForEach([&](int i, float logit) {
      if (row.Bin(logit) != bin) return;
      const float w = row.Weight(logit);
      const uint64_t key = static_cast<uint64_t>(~__float_as_uint(w)) << 32 | static_cast<uint32_t>(i);
      if (w > 0) s.list[atomicAdd(&s.list_size, 1u)] = key;
    });
    __syncthreads();
    SortList(s, size);
    Mass units[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = 2 * threadIdx.x + k;
      if (at < size) units[k] = Units(__uint_as_float(~static_cast<uint32_t>(s.list[at] >> 32)));
    }
    Mass through = BlockScan(units[0] + units[1], s);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = 2 * threadIdx.x + k;
      const bool here =
          at < size && (by_count ? static_cast<Mass>(at) == rest : through <= rest && rest < through + units[k]);
      through += units[k];
      if (here) s.found = static_cast<uint32_t>(s.list[at]), s.found_through = mass_before + through;
    }
    __syncthreads();
    return {s.found, s.found_through};
  }
  const auto bits_of = [&](float logit) { return ~__float_as_uint(row.Weight(logit)); };
  const auto measure = [&](float logit) {
    const float w = row.Bin(logit) == bin ? row.Weight(logit) : 0.f;
    return w > 0 ? (by_count ? Mass{1} : Units(w)) : Mass{0};
  };
  const uint32_t bits = Descend(
      row, rest, [&](int, float logit) { return bits_of(logit); }, measure, s);
  const Mass among = s.found_rest;
  const uint32_t id = Descend(
      row, among, [](int i, float) { return static_cast<uint32_t>(i); },
      [&](float logit) { return bits_of(logit) == bits ? measure(logit) : Mass{0}; }, s);
  Mass sum = 0;
  row.ForEach([&](int i, float logit) {
    const float w = row.Bin(logit) == bin ? row.Weight(logit) : 0.f;
    const uint32_t order = ~__float_as_uint(w);
    if (w > 0 && (order < bits || (order == bits && static_cast<uint32_t>(i) <= id))) sum += Units(w);
  });
  return {id, mass_before + BlockSum(sum, s)};
}

// The first candidate in order of ids at which the running mass exceeds `target`. Tiles of kThreads ids.
__device__ uint32_t LocateById(const Row& row, Mass target, Shared& s) {
  const int lane = threadIdx.x % 32, tiles = (row.vocab + kThreads - 1) / kThreads;  // at most kBins
  for (int t = threadIdx.x / 32; t < tiles; t += kWarps) {
    Mass sum = 0;
#pragma unroll 8
    for (int i = t * kThreads + lane; i < min(row.vocab, (t + 1) * kThreads); i += 32) {
      const float w = row.Weight(row.Logit(i));
      if (w > 0) sum += Units(w);
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0) s.list[t] = sum;
  }
  __syncthreads();
  const Mass tile = static_cast<int>(threadIdx.x) < tiles ? s.list[threadIdx.x] : 0, before = BlockScan(tile, s);
  if (before <= target && target < before + tile) s.found = threadIdx.x, s.found_rest = target - before;
  __syncthreads();
  const int i = static_cast<int>(s.found) * kThreads + static_cast<int>(threadIdx.x);
  const Mass rest = s.found_rest;
  const float w = i < row.vocab ? row.Weight(row.Logit(i)) : 0.f;
  const Mass units = w > 0 ? Units(w) : 0, up_to = BlockScan(units, s);
  if (up_to <= rest && rest < up_to + units) s.found = static_cast<uint32_t>(i);
  __syncthreads();
  return s.found;
}

__device__ uint64_t ArgMaxKey(float x, int i) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(i);
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const SampleArgs a) {
  extern __shared__ __align__(16) uint8_t bytes[];
  Shared& s = *reinterpret_cast<Shared*>(bytes);
  const SampleRow params = a.params[blockIdx.x];
  Row row = {};
  row.logits = a.logits + blockIdx.x * a.vocab;
  row.allowed = a.allowed;
  row.vocab = static_cast<int>(a.vocab);
  row.temperature = params.temperature;
  row.floor = fmaxf(params.min_p, 0.f);
  row.bins_per_logit = kBinsPerUnit / params.temperature;
  uint64_t key = 0;
  bool failed = false;
  row.ForEach([&](int i, float logit) {
    failed = failed || isnan(logit);
    if (a.allowed == nullptr || a.allowed[i] != 0) key = max(key, ArgMaxKey(logit, i));
  });
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

  Histogram(row, s);
  Mass total = s.mass_before[kBins];
  const double draw = UniformDraw(params.seed, params.position);
  const auto target_of = [&] { return min(static_cast<Mass>(draw * static_cast<double>(total)), total - 1); };
  // top-k first, then top-p of what it left.
  const bool few = params.top_k > 0 && params.top_k < s.count_before[kBins];
  if (few) total = Locate(row, params.top_k - 1, true, s).through;
  if (params.top_p < 1) {
    // The first id at which the mass reaches top_p of the total: at which it exceeds what is just below that.
    const double wanted = ceil(static_cast<double>(fmaxf(params.top_p, 0.f)) * static_cast<double>(total));
    total = Locate(row, wanted < 1 ? 0 : static_cast<Mass>(wanted) - 1, false, s).through;
  }
  // Without truncation the host has not sorted: it draws in order of ids.
  const uint32_t token =
      few || params.top_p < 1 ? Locate(row, target_of(), false, s).id : LocateById(row, target_of(), s);
  if (threadIdx.x == 0) a.tokens[blockIdx.x] = token;
}

}  // namespace

absl::Status SampleTokens(const SampleArgs& args, const Stream& stream) {
  if (args.rows == 0) return absl::OkStatus();
  if (args.vocab < 1 || args.vocab > kVocabMax) {
    return absl::InvalidArgumentError(absl::StrCat("SampleTokens: ", args.vocab, " ids"));
  }
  MK_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  SampleKernel<<<static_cast<unsigned>(args.rows), kThreads, sizeof(Shared), stream.handle()>>>(args);
  MK_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace minke::cuda
