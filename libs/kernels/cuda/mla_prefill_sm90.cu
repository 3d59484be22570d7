// Naive MLA prefill for Hopper. A block is persistent and takes tiles of 128 queries of one head from a counter, the
// longest first. Two consumer warpgroups of 64 rows; keys and values arrive in blocks of 128 through two stages each.
// Inside a warpgroup the scores of the next block are computed beside the softmax of this one's predecessor; between
// the two, turns (kTurns) keep one in its products while the other is in its softmax. docs/gpu.md has the arithmetic.
#include "libs/kernels/cuda/mla_prefill_kernels.h"
#include "libs/kernels/cuda/ptx.cuh"

namespace minke::cuda {
namespace {

using namespace ptx;

constexpr int kThreads = 384;
constexpr int kRows = kPrefillTileRows;
constexpr int kKeys = 128;
constexpr int kStages = 2;
constexpr int kTile = 128 * 64 * 2;  // 128 rows x 64 columns
constexpr int kKeyTiles = 3, kValueTiles = 2;
constexpr float kMaxLag = 8;  // as in decode: running maxima may lag by 2^8

constexpr int kQ = 0;
constexpr int kK = kQ + kKeyTiles * kTile;
constexpr int kV = kK + kStages * kKeyTiles * kTile;
constexpr int kWork = kV + kStages * kValueTiles * kTile;  // 2 x Work
constexpr int kBarriers = kWork + 2 * 32;
constexpr int kQFull = kBarriers;
constexpr int kQEmpty = kQFull + 8;
constexpr int kKFull = kQEmpty + 8;
constexpr int kKEmpty = kKFull + 8 * kStages;
constexpr int kVFull = kKEmpty + 8 * kStages;
constexpr int kVEmpty = kVFull + 8 * kStages;
constexpr int kVLanded = kVEmpty + 8 * kStages;  // only for blocks past a sequence's end
constexpr int kWorkFull = kVLanded + 8;
constexpr int kWorkEmpty = kWorkFull + 16;
constexpr int kSharedBytes = kWorkEmpty + 16;
static_assert(kSharedBytes <= 227 * 1024);

constexpr int kTurn = 1;  // named barriers 1, 2: + warpgroup whose turn it is

// One tile of queries.
struct Work {
  int query;   // first row
  int rows;    // valid rows
  int head;    // < 0: no more work
  int key;     // first row of the sequence's keys
  int keys;    // of the sequence
  int limit;   // keys that the tile's first row sees
  int blocks;  // of keys
  int unused;
};
static_assert(sizeof(Work) == 32);

__device__ __forceinline__ Work Decode(const PrefillParams& p, int tile, int& span_at) {
  Work work = {};
  work.head = -1;
  if (tile >= p.tiles) return work;
  while (span_at + 1 < p.span_count && p.spans[span_at + 1].tile_begin <= tile) ++span_at;
  const PrefillSpan span = p.spans[span_at];
  const int per_head = (span.queries + kRows - 1) / kRows, local = tile - span.tile_begin;
  const int first = (per_head - 1 - local % per_head) * kRows;  // the longest first
  work.query = span.query_begin + first;
  work.rows = min(kRows, span.queries - first);
  work.head = local / per_head;
  work.key = span.key_begin;
  work.keys = span.keys;
  work.limit = span.keys - span.queries + first + 1;
  work.blocks = (work.limit + work.rows - 1 + kKeys - 1) / kKeys;
  return work;
}

__device__ __forceinline__ Work ReadWork(const uint8_t* shared, int slot) {
  const int4* from = reinterpret_cast<const int4*>(shared + kWork + slot * 32);
  const int4 a = from[0], b = from[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Takes tiles, fetches queries and keys. One warp; lane 0 works.
__device__ __forceinline__ void ProduceKeys(const PrefillParams& p, const PrefillMaps& maps, uint8_t* shared,
                                            uint32_t base) {
  int span_at = 0, block = 0;
  int tile = atomicAdd(p.counters, 1);
  for (int n = 0;; ++n) {
    const Work work = Decode(p, tile, span_at);
    const int slot = n & 1;
    BarrierWait(base + kWorkEmpty + 8 * slot, ((n >> 1) & 1) ^ 1);
    *reinterpret_cast<Work*>(shared + kWork + slot * 32) = work;
    BarrierArrive(base + kWorkFull + 8 * slot);
    if (work.head < 0) break;
    tile = atomicAdd(p.counters, 1);  // read after this tile's loads
    BarrierWait(base + kQEmpty, (n & 1) ^ 1);
    BarrierExpect(base + kQFull, kKeyTiles * kTile);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      Load3D(base + kQ + i * kTile, &maps.q, i * 64, work.head, work.query, base + kQFull);
    }
    const int rope_head = p.k_rope.head == 0 ? 0 : work.head;
    for (int j = work.blocks - 1; j >= 0; --j, ++block) {
      const int stage = block % kStages;
      const uint32_t parity = (block / kStages) & 1, full = base + kKFull + 8 * stage;
      const uint32_t to = base + kK + stage * kKeyTiles * kTile;
      const int row = work.key + j * kKeys;
      BarrierWait(base + kKEmpty + 8 * stage, parity ^ 1);
      BarrierExpect(full, kKeyTiles * kTile);
      Load3D(to, &maps.k, 0, work.head, row, full);
      Load3D(to + kTile, &maps.k, 64, work.head, row, full);
      Load3D(to + 2 * kTile, &maps.k_rope, 0, rope_head, row, full);
    }
  }
  // The last block leaves the counters as it found them.
  if (atomicAdd(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    p.counters[0] = 0;
    p.counters[1] = 0;
  }
}

// Fetches values. One warp: rows past the sequence's end may be anything, and 0 x NaN is NaN, so they are cleared.
__device__ __forceinline__ void ProduceValues(const PrefillMaps& maps, uint8_t* shared, uint32_t base, int lane) {
  int block = 0, cleared = 0;
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    BarrierWait(base + kWorkFull + 8 * slot, (n >> 1) & 1);
    const Work work = ReadWork(shared, slot);
    __syncwarp();
    if (lane == 0) BarrierArrive(base + kWorkEmpty + 8 * slot);
    if (work.head < 0) break;
    for (int j = work.blocks - 1; j >= 0; --j, ++block) {
      const int stage = block % kStages;
      const uint32_t parity = (block / kStages) & 1;
      const uint32_t to = base + kV + stage * kValueTiles * kTile;
      const int row = work.key + j * kKeys, valid = work.keys - j * kKeys;
      const uint32_t full = base + kVFull + 8 * stage;
      const uint32_t landed = valid < kKeys ? base + kVLanded : full;
      BarrierWait(base + kVEmpty + 8 * stage, parity ^ 1);
      if (lane == 0) {
        BarrierExpect(landed, kValueTiles * kTile);
        Load3D(to, &maps.v, 0, work.head, row, landed);
        Load3D(to + kTile, &maps.v, 64, work.head, row, landed);
      }
      if (valid < kKeys) {
        BarrierWait(landed, cleared++ & 1);
        for (int at = valid * 128 + lane * 16; at < kTile; at += 32 * 16) {
#pragma unroll
          for (int tile = 0; tile < kValueTiles; ++tile) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to + tile * kTile + at), "r"(0) : "memory");
          }
        }
        FenceAsyncShared();
        __syncwarp();
        if (lane == 0) BarrierArrive(full);
      }
      __syncwarp();
    }
  }
}

__device__ __forceinline__ void Scores(float (&s)[64], uint32_t q, uint32_t keys) {
#pragma unroll
  for (int k = 0; k < 12; ++k) {
    const uint32_t at = k / 4 * kTile + k % 4 * 32;
    ProductN128Shared<0>(s, Descriptor(q + at, 1024, 16), Descriptor(keys + at, 1024, 16), k != 0);
  }
}

__device__ __forceinline__ void Values(float (&o)[64], const uint32_t (&probabilities)[32], uint32_t values) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    ProductN128Registers<1>(o, probabilities + 4 * k, Descriptor(values + k * 2048, 1024, kTile), 1);
  }
}

__device__ __forceinline__ float Factor(float from, float to) { return from == to ? 1.f : Exp2(from - to); }

// The softmax state of this thread's rows a = 16 warp + lane/4 and b = a + 8.
struct Rows {
  float m_a, m_b, l_a, l_b;
};

// s becomes probabilities; f_a, f_b what the output so far must be multiplied by.
__device__ __forceinline__ void Softmax(float (&s)[64], Rows& rows, float scale_log2, int key, int limit_a, bool masked,
                                        int lane, float& f_a, float& f_b) {
  if (masked) {
    const int seen_a = limit_a - key - 2 * (lane & 3), seen_b = seen_a + 8;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int column = 8 * (i / 4) + (i & 1);
      if (column >= ((i & 2) ? seen_b : seen_a)) s[i] = -INFINITY;
    }
  }
  float to_a = s[0], to_b = s[2];
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (i & 2) {
      to_b = fmaxf(to_b, s[i]);
    } else {
      to_a = fmaxf(to_a, s[i]);
    }
  }
#pragma unroll
  for (int d = 1; d <= 2; d <<= 1) {
    to_a = fmaxf(to_a, __shfl_xor_sync(~0u, to_a, d));
    to_b = fmaxf(to_b, __shfl_xor_sync(~0u, to_b, d));
  }
  to_a *= scale_log2, to_b *= scale_log2;
  to_a = to_a > rows.m_a + kMaxLag ? to_a : rows.m_a;
  to_b = to_b > rows.m_b + kMaxLag ? to_b : rows.m_b;
  f_a = Factor(rows.m_a, to_a), f_b = Factor(rows.m_b, to_b);
  rows.m_a = to_a, rows.m_b = to_b;
  const float minus_a = to_a == -INFINITY ? 0.f : -to_a, minus_b = to_b == -INFINITY ? 0.f : -to_b;
  float sum_a = 0, sum_b = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    s[i] = Exp2(fmaf(s[i], scale_log2, (i & 2) ? minus_b : minus_a));
    if (i & 2) {
      sum_b += s[i];
    } else {
      sum_a += s[i];
    }
  }
  rows.l_a = rows.l_a * f_a + sum_a;
  rows.l_b = rows.l_b * f_b + sum_b;
}

__device__ __forceinline__ void Pack(uint32_t (&probabilities)[32], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) probabilities[i] = PackBF16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void Release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) BarrierArrive(barrier);
}

// Four lanes hold 2 columns each of 4 blocks of 8; afterwards lane q holds the 8 columns of block q.
__device__ __forceinline__ uint4 Transpose(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int lane) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t x = __shfl_xor_sync(~0u, odd ? a : b, 1), y = __shfl_xor_sync(~0u, odd ? c : d, 1);
  if (odd) {
    a = x, c = y;
  } else {
    b = x, d = y;
  }
  x = __shfl_xor_sync(~0u, high ? a : c, 2), y = __shfl_xor_sync(~0u, high ? b : d, 2);
  if (high) {
    a = x, b = y;
  } else {
    c = x, d = y;
  }
  return make_uint4(a, b, c, d);
}

template <bool kTurns>
__device__ __forceinline__ void Consume(const PrefillParams& p, uint8_t* shared, uint32_t base, int group, int warp,
                                        int lane) {
  if (kTurns && group == 1) NamedArrive<256>(kTurn);
  int block = 0;
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    BarrierWait(base + kWorkFull + 8 * slot, (n >> 1) & 1);
    const Work work = ReadWork(shared, slot);
    Release(base + kWorkEmpty + 8 * slot, lane);
    if (work.head < 0) break;
    const int row = group * 64 + warp * 16 + lane / 4;
    const int limit_a = work.limit + row, limit_group = work.limit + group * 64;
    const uint32_t q = base + kQ + group * (kTile / 2);

    float o[64], s[64];
    uint32_t probabilities[32];
    Rows rows = {-INFINITY, -INFINITY, 0, 0};
    float f_a, f_b;
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = 0;
    BarrierWait(base + kQFull, n & 1);

    const auto stage_of = [](int b) { return b % kStages; };
    const auto parity_of = [](int b) { return static_cast<uint32_t>(b / kStages) & 1; };
    int j = work.blocks - 1;
    BarrierWait(base + kKFull + 8 * stage_of(block), parity_of(block));
    ProductsBegin();
    Scores(s, q, base + kK + stage_of(block) * kKeyTiles * kTile);
    ProductsCommit();
    ProductsWait<0>();
    Pin(s);
    Release(base + kKEmpty + 8 * stage_of(block), lane);
    if (j == 0) Release(base + kQEmpty, lane);
    Softmax(s, rows, p.scale_log2, j * kKeys, limit_a, (j + 1) * kKeys > limit_group, lane, f_a, f_b);
    Pack(probabilities, s);

    for (--j; j >= 0; --j) {
      // Block j's scores, then the previous one's values; the softmax runs beside the values.
      const int values = block++;
      BarrierWait(base + kKFull + 8 * stage_of(block), parity_of(block));
      if (kTurns) NamedSync<256>(kTurn + group);
      ProductsBegin();
      Scores(s, q, base + kK + stage_of(block) * kKeyTiles * kTile);
      ProductsCommit();
      BarrierWait(base + kVFull + 8 * stage_of(values), parity_of(values));
      ProductsBegin();
      Values(o, probabilities, base + kV + stage_of(values) * kValueTiles * kTile);
      ProductsCommit();
      if (kTurns) NamedArrive<256>(kTurn + (group ^ 1));
      ProductsWait<1>();
      Pin(s);
      Release(base + kKEmpty + 8 * stage_of(block), lane);
      if (j == 0) Release(base + kQEmpty, lane);
      Softmax(s, rows, p.scale_log2, j * kKeys, limit_a, (j + 1) * kKeys > limit_group, lane, f_a, f_b);
      ProductsWait<0>();
      Pin(o);
      Release(base + kVEmpty + 8 * stage_of(values), lane);
      if (__any_sync(~0u, f_a != 1.f || f_b != 1.f)) {
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i] *= (i & 2) ? f_b : f_a;
      }
      Pack(probabilities, s);
    }
    BarrierWait(base + kVFull + 8 * stage_of(block), parity_of(block));
    ProductsBegin();
    Values(o, probabilities, base + kV + stage_of(block) * kValueTiles * kTile);
    ProductsCommit();
    ProductsWait<0>();
    Pin(o);
    Release(base + kVEmpty + 8 * stage_of(block), lane);
    ++block;

#pragma unroll
    for (int d = 1; d <= 2; d <<= 1) {
      rows.l_a += __shfl_xor_sync(~0u, rows.l_a, d);
      rows.l_b += __shfl_xor_sync(~0u, rows.l_b, d);
    }
    const float scale_a = 1.f / rows.l_a, scale_b = 1.f / rows.l_b;
    const bool valid_a = row < work.rows, valid_b = row + 8 < work.rows;
    const int64_t at = static_cast<int64_t>(work.query + row) * p.heads + work.head;
    uint16_t* out = p.out + at * 128;
    const int64_t eight = static_cast<int64_t>(8) * p.heads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* v = o + 16 * i;
      const uint4 a = Transpose(PackBF16(v[0] * scale_a, v[1] * scale_a), PackBF16(v[4] * scale_a, v[5] * scale_a),
                                PackBF16(v[8] * scale_a, v[9] * scale_a), PackBF16(v[12] * scale_a, v[13] * scale_a), lane);
      const uint4 b = Transpose(PackBF16(v[2] * scale_b, v[3] * scale_b), PackBF16(v[6] * scale_b, v[7] * scale_b),
                                PackBF16(v[10] * scale_b, v[11] * scale_b), PackBF16(v[14] * scale_b, v[15] * scale_b), lane);
      const int column = 32 * i + 8 * (lane & 3);
      if (valid_a) *reinterpret_cast<uint4*>(out + column) = a;
      if (valid_b) *reinterpret_cast<uint4*>(out + eight * 128 + column) = b;
    }
    if ((lane & 3) == 0 && p.lse != nullptr) {
      constexpr float kLn2 = 0.69314718056f;
      if (valid_a) p.lse[at] = (rows.m_a + __log2f(rows.l_a)) * kLn2;
      if (valid_b) p.lse[at + eight] = (rows.m_b + __log2f(rows.l_b)) * kLn2;
    }
  }
}

template <bool kTurns>
__global__ void __launch_bounds__(kThreads, 1)
    PrefillKernel(const PrefillParams p, const __grid_constant__ PrefillMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    if (base % 1024 != 0) __trap();
    PrefetchMap(&maps.q);
    PrefetchMap(&maps.k);
    PrefetchMap(&maps.k_rope);
    PrefetchMap(&maps.v);
    BarrierInit(base + kQFull, 1);
    BarrierInit(base + kQEmpty, 8);
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(base + kKFull + 8 * i, 1);
      BarrierInit(base + kKEmpty + 8 * i, 8);
      BarrierInit(base + kVFull + 8 * i, 1);
      BarrierInit(base + kVEmpty + 8 * i, 8);
    }
    BarrierInit(base + kVLanded, 1);
    for (int i = 0; i < 2; ++i) {
      BarrierInit(base + kWorkFull + 8 * i, 1);
      BarrierInit(base + kWorkEmpty + 8 * i, 9);  // 8 consumer warps and the one that fetches values
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (warp >= 8) {
    RegistersDown<24>();
    if (warp == 8 && lane == 0) ProduceKeys(p, maps, shared, base);
    if (warp == 9) ProduceValues(maps, shared, base, lane);
  } else {
    RegistersUp<240>();
    Consume<kTurns>(p, shared, base, warp / 4, warp % 4, lane);
  }
#endif
}

template <bool kTurns>
cudaError_t Launch(const PrefillParams& params, const PrefillMaps& maps, int blocks, cudaStream_t stream) {
  const auto kernel = PrefillKernel<kTurns>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(params, maps);
  return cudaGetLastError();
}

}  // namespace

// variant: 0 the one to use; 1 without turns.
cudaError_t LaunchPrefillSm90(const PrefillParams& params, const PrefillMaps& maps, int blocks, int variant,
                              cudaStream_t stream) {
  return variant == 1 ? Launch<false>(params, maps, blocks, stream) : Launch<true>(params, maps, blocks, stream);
}

}  // namespace minke::cuda
