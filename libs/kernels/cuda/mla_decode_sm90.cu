// MLA decode for Hopper. docs/gpu.md has the arithmetic behind the schedule; in short:
//
// A block owns 64 query rows (M of wgmma) of one item and walks its pages. Two consumer warpgroups: both hold 64 rows
// x 256 columns of the output (128 registers a thread); the scores of even pages are computed by the first, those of
// odd pages by the second, each handing its probabilities to the other through shared memory. So one warpgroup's
// softmax runs beside the other's products.
//
// A page is 9 tiles of 64 tokens x 64 columns under the 128-byte swizzle: as keys they are K-major operands, as
// values the same bytes are read transposed. Tiles travel in pairs (pairs 0, 1: output columns of warpgroup 0; 2, 3:
// of warpgroup 1) and the rotated part alone; every stream of tiles has its own ring and its own producer warp, so a
// tile is fetched the moment its predecessor is dead. The query's rotated part lives in registers, which makes room
// for a third slot of pair 0. The rotated part of a page is dead after the scores: its place takes the probabilities.
//
// With kCluster = 2 the two blocks of a cluster own the two halves of 128 rows, and each fetches one half of every
// tile for both (multicast).
#include "libs/kernels/cuda/mla_decode_kernels.h"
#include "libs/kernels/cuda/ptx.cuh"

namespace minke::cuda {
namespace {

using namespace ptx;

constexpr int kThreads = 384;  // two consumer warpgroups, one producer
constexpr int kTile = 64 * 64 * 2;
constexpr int kPair = 2 * kTile;
constexpr int kRank = 512;
// Running maxima may lag behind the true ones by this much (log2): rescaling the output is then rare, and 2^8 is
// harmless in f32 sums and in bf16 probabilities.
constexpr float kMaxLag = 8;

// Shared memory, in bytes from a 1024-byte boundary.
constexpr int kQ = 0;                         // 4 pairs
constexpr int kFirst = kQ + 4 * kPair;        // pair 0: 3 slots
constexpr int kOthers = kFirst + 3 * kPair;   // pairs 1, 2, 3: 2 slots each, [slot][pair]
constexpr int kRope = kOthers + 6 * kPair;    // 2 slots: rotated part, then probabilities
constexpr int kMaxima = kRope + 2 * kTile;    // [page parity][64] f32
constexpr int kSums = kMaxima + 2 * 64 * 4;   // [segment parity][warpgroup][64] f32
constexpr int kBarriers = kSums + 4 * 64 * 4;
constexpr int kQFull = kBarriers;
constexpr int kQEmpty = kQFull + 8;
constexpr int kFirstFull = kQEmpty + 8;           // [3]
constexpr int kFirstEmpty = kFirstFull + 3 * 8;   // [3]
constexpr int kOthersFull = kFirstEmpty + 3 * 8;  // [slot][pair]
constexpr int kOthersEmpty = kOthersFull + 6 * 8;
constexpr int kRopeFull = kOthersEmpty + 6 * 8;  // [2]
constexpr int kRopeEmpty = kRopeFull + 2 * 8;
constexpr int kSharedBytes = kRopeEmpty + 2 * 8;
static_assert(kSharedBytes <= 227 * 1024);

// Named barriers. 0 is __syncthreads.
constexpr int kProbabilities = 1;  // + warpgroup that wrote them
constexpr int kGroup = 3;          // + warpgroup: its own 128 threads
constexpr int kBoth = 5;

// One pair of tiles of one page: where it lies, its barriers, the parity of its phase.
struct Slot {
  uint32_t tiles, full, empty, parity;
};

__device__ __forceinline__ Slot PairSlot(uint32_t base, int pair, int page) {
  if (pair == 0) {
    const int slot = page % 3;
    return {base + kFirst + slot * kPair, base + kFirstFull + slot * 8, base + kFirstEmpty + slot * 8,
            static_cast<uint32_t>(page / 3) & 1};
  }
  const int slot = page % 2, i = slot * 3 + pair - 1;
  return {base + kOthers + i * kPair, base + kOthersFull + i * 8, base + kOthersEmpty + i * 8,
          static_cast<uint32_t>(page / 2) & 1};
}

// The ring of rotated parts also carries every segment's rotated queries, ahead of its pages.
__device__ __forceinline__ Slot RopeSlot(uint32_t base, int page, int segments) {
  const int at = page + segments, slot = at % 2;
  return {base + kRope + slot * kTile, base + kRopeFull + slot * 8, base + kRopeEmpty + slot * 8,
          static_cast<uint32_t>(at / 2) & 1};
}

// Every warp that used a slot says so, to the producers of all blocks that write into it.
template <int kCluster>
__device__ __forceinline__ void Release(uint32_t empty, int lane) {
  __syncwarp();
  if (kCluster == 1) {
    if (lane == 0) BarrierArrive(empty);
  } else {
    if (lane < kCluster) BarrierArriveRemote(empty, lane);
  }
}

template <int kCluster>
__device__ __forceinline__ void LoadTile(uint32_t to, const CUtensorMap* map, int x, uint32_t page, uint32_t barrier,
                                         uint32_t rank) {
  if (kCluster == 1) {
    Load2D(to, map, x, page * 64, barrier);
  } else {
    Load2DMulticast(to + rank * (kTile / 2), map, x, page * 64 + rank * 32, barrier, 3);
  }
}

// The page numbers of a segment, read ahead of their use.
struct PageReader {
  __device__ PageReader(const uint32_t* table, int pages) : table(table), last(pages - 1) {
    now = __ldg(table);
    next = __ldg(table + min(1, last));
    ahead = __ldg(table + min(2, last));
    at = 3;
  }
  __device__ void Advance() {
    now = next;
    next = ahead;
    ahead = __ldg(table + min(at++, last));
  }
  const uint32_t* table;
  int last, at;
  uint32_t now, next, ahead;
};

// One thread: fetches pairs kFrom ... kTo - 1 of all pages of this worker.
template <int kCluster, int kFrom, int kTo>
__device__ __forceinline__ void ProducePairs(const DecodeParams& p, const CUtensorMap* map, uint32_t base, int begin,
                                             int end, uint32_t rank) {
  int page = 0;
  for (int s = begin; s < end; ++s) {
    const DecodeSegment& segment = p.segments[s];
    const int pages = segment.pages;
    PageReader reader(p.page_table + segment.sequence * p.page_table_stride + segment.page_begin, pages);
    for (int t = 0; t < pages; ++t, ++page, reader.Advance()) {
#pragma unroll
      for (int pair = kFrom; pair < kTo; ++pair) {
        const Slot slot = PairSlot(base, pair, page);
        BarrierWait(slot.empty, slot.parity ^ 1);
        BarrierExpect(slot.full, kPair);
        LoadTile<kCluster>(slot.tiles, map, pair * 128, reader.now, slot.full, rank);
        LoadTile<kCluster>(slot.tiles + kTile, map, pair * 128 + 64, reader.now, slot.full, rank);
      }
    }
  }
}

template <int kCluster>
__device__ __forceinline__ void ProduceQueriesAndRope(const DecodeParams& p, const CUtensorMap* q_map,
                                                      const CUtensorMap* map, uint32_t base, int begin, int end,
                                                      uint32_t rank) {
  int page = 0;
  for (int s = begin; s < end; ++s) {
    const DecodeSegment& segment = p.segments[s];
    const int pages = segment.pages, row = segment.row + static_cast<int>(rank) * 64;
    BarrierWait(base + kQEmpty, ((s - begin) & 1) ^ 1);
    BarrierExpect(base + kQFull, 4 * kPair);
#pragma unroll
    for (int i = 0; i < 8; ++i) Load2D(base + kQ + i * kTile, q_map, i * 64, row, base + kQFull);
    const Slot q_rope = RopeSlot(base, page, s - begin);
    BarrierWait(q_rope.empty, q_rope.parity ^ 1);
    BarrierExpect(q_rope.full, kTile);
    Load2D(q_rope.tiles, q_map, kRank, row, q_rope.full);
    if (s + 1 < end) {  // the next segment's wait for this one's end, and then not for memory
      const int next = p.segments[s + 1].row + static_cast<int>(rank) * 64;
#pragma unroll
      for (int i = 0; i < 9; ++i) Prefetch2D(q_map, i * 64, next);
    }
    PageReader reader(p.page_table + segment.sequence * p.page_table_stride + segment.page_begin, pages);
    for (int t = 0; t < pages; ++t, ++page, reader.Advance()) {
      const Slot slot = RopeSlot(base, page, s - begin + 1);
      BarrierWait(slot.empty, slot.parity ^ 1);
      BarrierExpect(slot.full, kTile);
      LoadTile<kCluster>(slot.tiles, map, kRank, reader.now, slot.full, rank);
    }
  }
}

// s (+)= the query's columns of a pair, times the page's.
__device__ __forceinline__ void ScoresOfPair(float (&s)[32], uint32_t q, uint32_t keys, int first) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint32_t at = k / 4 * kTile + k % 4 * 32;
    ProductN64Shared<0>(s, Descriptor(q + at, 1024, 16), Descriptor(keys + at, 1024, 16), k == 0 ? first : 1);
  }
}

// o (+)= probabilities times the values of one pair: 64 tokens x 128 columns, read transposed.
__device__ __forceinline__ void ValuesOfPair(float (&o)[64], const uint32_t (&probabilities)[16], uint32_t values,
                                             int accumulate) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ProductN128Registers<1>(o, probabilities + 4 * k, Descriptor(values + k * 2048, 1024, kTile),
                            k == 0 ? accumulate : 1);
  }
}

__device__ __forceinline__ void Scale(float (&o)[64], float a, float b) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    o[4 * i] *= a;
    o[4 * i + 1] *= a;
    o[4 * i + 2] *= b;
    o[4 * i + 3] *= b;
  }
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

__device__ __forceinline__ void StoreFinal(uint16_t* row_a, uint16_t* row_b, const float (&o)[64], float scale_a,
                                           float scale_b, bool valid_a, bool valid_b, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* v = o + 16 * i;
    const uint4 a = Transpose(PackBF16(v[0] * scale_a, v[1] * scale_a), PackBF16(v[4] * scale_a, v[5] * scale_a),
                              PackBF16(v[8] * scale_a, v[9] * scale_a), PackBF16(v[12] * scale_a, v[13] * scale_a), lane);
    const uint4 b = Transpose(PackBF16(v[2] * scale_b, v[3] * scale_b), PackBF16(v[6] * scale_b, v[7] * scale_b),
                              PackBF16(v[10] * scale_b, v[11] * scale_b), PackBF16(v[14] * scale_b, v[15] * scale_b), lane);
    const int column = 32 * i + 8 * (lane & 3);
    if (valid_a) *reinterpret_cast<uint4*>(row_a + column) = a;
    if (valid_b) *reinterpret_cast<uint4*>(row_b + column) = b;
  }
}

__device__ __forceinline__ void StorePartial(float* row_a, float* row_b, const float (&o)[64], float scale_a,
                                             float scale_b, bool valid_a, bool valid_b, int lane) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int column = 8 * i + 2 * (lane & 3);
    if (valid_a) __stcg(reinterpret_cast<float2*>(row_a + column), make_float2(o[4 * i] * scale_a, o[4 * i + 1] * scale_a));
    if (valid_b) {
      __stcg(reinterpret_cast<float2*>(row_b + column), make_float2(o[4 * i + 2] * scale_b, o[4 * i + 3] * scale_b));
    }
  }
}

// How far a row must be scaled when its maximum moves; maxima only grow, and may both still be -inf.
__device__ __forceinline__ float Factor(float from, float to) { return from == to ? 1.f : Exp2(from - to); }

template <int kCluster>
struct Consumer {
  const DecodeParams& p;
  const uint32_t base;
  const int group, warp, lane, rank;  // warpgroup 0 or 1, warp within it, block of the cluster
  float o0[64], o1[64];               // columns 256 group ... + 127, + 128 ... + 255
  float m_a, m_b, l_a, l_b;           // of rows a = 16 warp + lane/4 and b = a + 8: scale of o and l
  int accumulate;                     // 0 until o holds something

  __device__ __forceinline__ Consumer(const DecodeParams& p, uint32_t base, int group, int warp, int lane, int rank)
      : p(p), base(base), group(group), warp(warp), lane(lane), rank(rank) {}

  // Row and 16-byte chunk of this lane in a 64 x 64 tile for ldmatrix / stmatrix of 16 columns.
  __device__ __forceinline__ uint32_t FragmentAt(uint32_t tile, int k) const {
    const int row = warp * 16 + (lane & 15), chunk = 2 * k + lane / 16;
    return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  __device__ __forceinline__ void Rescale(float to_a, float to_b) {
    const float f_a = Factor(m_a, to_a), f_b = Factor(m_b, to_b);
    m_a = to_a, m_b = to_b;
    if (__any_sync(~0u, f_a != 1.f || f_b != 1.f)) {
      l_a *= f_a, l_b *= f_b;
      if (accumulate) {
        Scale(o0, f_a, f_b);
        Scale(o1, f_a, f_b);
      }
    }
  }

  __device__ __forceinline__ void Values(const uint32_t (&probabilities)[16], int page) {
    const Slot low = PairSlot(base, 2 * group, page), high = PairSlot(base, 2 * group + 1, page);
    BarrierWait(low.full, low.parity);
    BarrierWait(high.full, high.parity);
    ProductsBegin();
    ValuesOfPair(o0, probabilities, low.tiles, accumulate);
    ValuesOfPair(o1, probabilities, high.tiles, accumulate);
    ProductsCommit();
    accumulate = 1;
  }

  __device__ __forceinline__ void ReleaseValues(int page) {
    Release<kCluster>(PairSlot(base, 2 * group, page).empty, lane);
    Release<kCluster>(PairSlot(base, 2 * group + 1, page).empty, lane);
  }

  // The other warpgroup's page: takes its probabilities and maxima, starts the product.
  __device__ __forceinline__ void OtherPage(uint32_t (&probabilities)[16], int page, int segments, int t) {
    NamedSync<256>(kProbabilities + (group ^ 1));
    const Slot rope = RopeSlot(base, page, segments);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t r[4];
      LoadMatrix4(r, FragmentAt(rope.tiles, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[4 * k + i] = r[i];
    }
    float to_a, to_b;
    const uint32_t maxima = base + kMaxima + ((t & 1) * 64 + warp * 16 + lane / 4) * 4;
    asm volatile("ld.shared.f32 %0, [%2];\nld.shared.f32 %1, [%2 + 32];" : "=f"(to_a), "=f"(to_b) : "r"(maxima));
    Rescale(to_a, to_b);
    Values(probabilities, page);
    // Only now: the products have waited for the probabilities to be in registers. A load from shared memory may be
    // late (the tensor cores come first there), and an arrival does not wait for it.
    Release<kCluster>(rope.empty, lane);
  }

  // A page that the sequence does not fill: what lies past its end may be anything, and 0 x NaN is NaN.
  __device__ __forceinline__ void ClearTail(int page, int tokens) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const Slot slot = PairSlot(base, pair, page);
      BarrierWait(slot.full, slot.parity);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        for (int at = tokens * 128 + (warp * 32 + lane) * 16; at < kTile; at += 128 * 16) {
          asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(slot.tiles + tile * kTile + at), "r"(0)
                       : "memory");
        }
      }
    }
    FenceAsyncShared();
    NamedSync<128>(kGroup + group);
  }

  // The pages of one segment, as this thread sees them.
  struct Pages {
    int first_page;  // in the rings
    int pages, page_begin, length, first_limit, limit_a, limit_b, index;
  };

  __device__ __forceinline__ void ScoresOfPairs(float (&s)[32], int from, int to, int page) {
#pragma unroll
    for (int pair = from; pair < to; ++pair) {
      const Slot slot = PairSlot(base, pair, page);
      BarrierWait(slot.full, slot.parity);
      ScoresOfPair(s, base + kQ + pair * kPair, slot.tiles, pair);
    }
  }

  __device__ __forceinline__ void ScoresOfRope(float (&s)[32], const uint32_t (&q_rope)[16], const Slot& rope) {
    BarrierWait(rope.full, rope.parity);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ProductN64Registers<0>(s, q_rope + 4 * k, Descriptor(rope.tiles + k * 32, 1024, 16), 1);
    }
  }

  // s becomes probabilities relative to the new maxima (to_a, to_b).
  __device__ __forceinline__ void Softmax(float (&s)[32], const Pages& of, int t, float& to_a, float& to_b, float& sum_a,
                                          float& sum_b) {
    const int key = (of.page_begin + t) * 64;
    if (key + 64 > of.first_limit) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int column = key + 8 * (i / 4) + 2 * (lane & 3) + (i & 1);
        if (column >= ((i & 2) ? of.limit_b : of.limit_a)) s[i] = -INFINITY;
      }
    }
    to_a = s[0], to_b = s[2];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
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
    to_a *= p.scale_log2, to_b *= p.scale_log2;
    to_a = to_a > m_a + kMaxLag ? to_a : m_a;
    to_b = to_b > m_b + kMaxLag ? to_b : m_b;
    const float minus_a = to_a == -INFINITY ? 0.f : -to_a, minus_b = to_b == -INFINITY ? 0.f : -to_b;
    sum_a = sum_b = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      s[i] = Exp2(fmaf(s[i], p.scale_log2, (i & 2) ? minus_b : minus_a));
      if (i & 2) {
        sum_b += s[i];
      } else {
        sum_a += s[i];
      }
    }
  }

  // Hands this page's probabilities and maxima to the other warpgroup, in the place of the page's rotated part.
  __device__ __forceinline__ void Publish(const float (&s)[32], uint32_t (&probabilities)[16], const Slot& rope, int t,
                                          float to_a, float to_b) {
#pragma unroll
    for (int i = 0; i < 16; ++i) probabilities[i] = PackBF16(s[2 * i], s[2 * i + 1]);
    NamedSync<128>(kGroup + group);  // no warp's product reads the rotated keys any more
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      StoreMatrix4(FragmentAt(rope.tiles, k), probabilities[4 * k], probabilities[4 * k + 1], probabilities[4 * k + 2],
                   probabilities[4 * k + 3]);
    }
    if ((lane & 3) == 0) {
      const uint32_t maxima = base + kMaxima + ((t & 1) * 64 + warp * 16 + lane / 4) * 4;
      asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0 + 32], %2;" ::"r"(maxima), "f"(to_a), "f"(to_b)
                   : "memory");
    }
    __syncwarp();
    FenceAsyncShared();
    NamedArrive<256>(kProbabilities + group);
    Release<kCluster>(rope.empty, lane);
  }

  __device__ __forceinline__ void Scores(float (&s)[32], const Pages& of, int t, const uint32_t (&q_rope)[16]) {
    const int page = of.first_page + t, tokens = of.length - (of.page_begin + t) * 64;
    if (tokens < 64) ClearTail(page, tokens);
    ProductsBegin();
    ScoresOfPairs(s, 0, 4, page);
    ScoresOfRope(s, q_rope, RopeSlot(base, page, of.index + 1));
    ProductsCommit();
  }

  __device__ __forceinline__ void FinishValues(int page) {
    ProductsWait<0>();
    Pin(o0);
    Pin(o1);
    ReleaseValues(page);
  }

  // The first warpgroup's: an even page's scores, softmax and values, then the values of the odd page after it.
  __device__ __forceinline__ void EvenPage(const Pages& of, int t, const uint32_t (&q_rope)[16],
                                           uint32_t (&probabilities)[16]) {
    const int page = of.first_page + t;
    float s[32];
    Scores(s, of, t, q_rope);
    ProductsWait<0>();
    Pin(s);
    if (t + 2 >= of.pages) Release<1>(base + kQEmpty, lane);
    float to_a, to_b, sum_a, sum_b;
    Softmax(s, of, t, to_a, to_b, sum_a, sum_b);
    Publish(s, probabilities, RopeSlot(base, page, of.index + 1), t, to_a, to_b);
    Rescale(to_a, to_b);
    l_a += sum_a, l_b += sum_b;
    Values(probabilities, page);
    FinishValues(page);
    if (t + 1 < of.pages) {
      OtherPage(probabilities, page + 1, of.index + 1, t + 1);
      FinishValues(page + 1);
    }
  }

  // The second's: beside an odd page's scores and softmax the values of the even page before it, then its own.
  __device__ __forceinline__ void OddPage(const Pages& of, int t, const uint32_t (&q_rope)[16],
                                          uint32_t (&probabilities)[16]) {
    const int page = of.first_page + t;
    float s[32];
    Scores(s, of, t, q_rope);
    OtherPage(probabilities, page - 1, of.index + 1, t - 1);
    ProductsWait<1>();
    Pin(s);
    if (t + 2 >= of.pages) Release<1>(base + kQEmpty, lane);
    float to_a, to_b, sum_a, sum_b;
    Softmax(s, of, t, to_a, to_b, sum_a, sum_b);
    FinishValues(page - 1);
    Publish(s, probabilities, RopeSlot(base, page, of.index + 1), t, to_a, to_b);
    Rescale(to_a, to_b);
    l_a += sum_a, l_b += sum_b;
    Values(probabilities, page);
    FinishValues(page);
  }

  __device__ __forceinline__ void Segment(const DecodeSegment& segment, int index, int first_page) {
    const int pages = segment.pages, page_begin = segment.page_begin, length = segment.length;
    const int first_limit = segment.first_limit, item_row = segment.row, item_rows = segment.rows, split = segment.split;
    const int row = warp * 16 + lane / 4;
    const int in_sequence = segment.row_offset + rank * 64 + row;
    const int limit_a = first_limit + in_sequence / p.heads, limit_b = first_limit + (in_sequence + 8) / p.heads;

    uint32_t q_rope[16];
    {
      const Slot slot = RopeSlot(base, first_page, index);
      BarrierWait(slot.full, slot.parity);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t r[4];
        LoadMatrix4(r, FragmentAt(slot.tiles, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) q_rope[4 * k + i] = r[i];
      }
      FenceAsyncShared();  // read before the copy engine may write there again
      Release<kCluster>(slot.empty, lane);
    }
    BarrierWait(base + kQFull, index & 1);

    m_a = m_b = -INFINITY;
    l_a = l_b = 0;
    accumulate = 0;
    uint32_t probabilities[16];
    const Pages of = {first_page, pages, page_begin, length, first_limit, limit_a, limit_b, index};
    if (group == 0) {
      for (int t = 0; t < pages; t += 2) EvenPage(of, t, q_rope, probabilities);
    } else {
      for (int t = 1; t < pages; t += 2) OddPage(of, t, q_rope, probabilities);
      if (pages & 1) {
        OtherPage(probabilities, first_page + pages - 1, index + 1, pages - 1);
        if (pages == 1) Release<1>(base + kQEmpty, lane);  // a warpgroup without a page of its own
        FinishValues(first_page + pages - 1);
      }
    }

    // Both warpgroups now stand at the last page's maxima; their sums cover different pages.
#pragma unroll
    for (int d = 1; d <= 2; d <<= 1) {
      l_a += __shfl_xor_sync(~0u, l_a, d);
      l_b += __shfl_xor_sync(~0u, l_b, d);
    }
    const uint32_t sums = base + kSums + ((index & 1) * 128 + row) * 4;
    if ((lane & 3) == 0) {
      asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0 + 32], %2;" ::"r"(sums + group * 256), "f"(l_a), "f"(l_b)
                   : "memory");
    }
    NamedSync<256>(kBoth);
    float other_a, other_b;
    asm volatile("ld.shared.f32 %0, [%2];\nld.shared.f32 %1, [%2 + 32];"
                 : "=f"(other_a), "=f"(other_b)
                 : "r"(sums + (group ^ 1) * 256));
    l_a += other_a, l_b += other_b;
    const float scale_a = l_a > 0 ? 1.f / l_a : 0.f, scale_b = l_b > 0 ? 1.f / l_b : 0.f;
    const int in_item = rank * 64 + row;
    const bool valid_a = in_item < item_rows, valid_b = in_item + 8 < item_rows;
    const float sum_a = m_a + __log2f(l_a), sum_b = m_b + __log2f(l_b);  // -inf where nothing was seen
    const bool writes_sums = group == 0 && (lane & 3) == 0;
    if (split < 0) {
      uint16_t* out = p.out + static_cast<int64_t>(item_row + in_item) * kRank + group * 256;
      StoreFinal(out, out + 8 * kRank, o0, scale_a, scale_b, valid_a, valid_b, lane);
      StoreFinal(out + 128, out + 8 * kRank + 128, o1, scale_a, scale_b, valid_a, valid_b, lane);
      if (writes_sums && p.lse != nullptr) {
        constexpr float kLn2 = 0.69314718056f;
        if (valid_a) p.lse[item_row + in_item] = sum_a * kLn2;
        if (valid_b) p.lse[item_row + in_item + 8] = sum_b * kLn2;
      }
    } else {
      const int64_t at = static_cast<int64_t>(split) * p.item_rows + in_item;
      float* out = p.partials + at * kRank + group * 256;
      StorePartial(out, out + 8 * kRank, o0, scale_a, scale_b, valid_a, valid_b, lane);
      StorePartial(out + 128, out + 8 * kRank + 128, o1, scale_a, scale_b, valid_a, valid_b, lane);
      if (writes_sums) {
        if (valid_a) p.sums[at] = sum_a;
        if (valid_b) p.sums[at + 8] = sum_b;
      }
    }
  }
};

template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    DecodeKernel(const DecodeParams p, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap page_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const uint32_t rank = kCluster == 1 ? 0 : ClusterRank();
  if (threadIdx.x == 0) {
    if (base % 1024 != 0) __trap();
    PrefetchMap(&q_map);
    PrefetchMap(&page_map);
    BarrierInit(base + kQFull, 1);
    BarrierInit(base + kQEmpty, 8);
    for (int i = 0; i < 3; ++i) {
      BarrierInit(base + kFirstFull + 8 * i, 1);
      BarrierInit(base + kFirstEmpty + 8 * i, 4 * kCluster);
    }
    for (int i = 0; i < 6; ++i) {
      BarrierInit(base + kOthersFull + 8 * i, 1);
      BarrierInit(base + kOthersEmpty + 8 * i, 4 * kCluster);
    }
    for (int i = 0; i < 2; ++i) {
      BarrierInit(base + kRopeFull + 8 * i, 1);
      BarrierInit(base + kRopeEmpty + 8 * i, 8 * kCluster);
    }
    FenceBarrierInit();
  }
  if (kCluster == 1) {
    __syncthreads();
  } else {
    ClusterSync();
  }
  LaunchDependents();
  const int worker = blockIdx.x / kCluster;
  const int begin = p.worker_begin[worker], end = p.worker_begin[worker + 1];
  if (warp >= 8) {
    RegistersDown<24>();
    if (lane == 0) {
      if (warp == 8) {
        ProducePairs<kCluster, 0, 1>(p, &page_map, base, begin, end, rank);
      } else if (warp == 9) {
        ProducePairs<kCluster, 1, 2>(p, &page_map, base, begin, end, rank);
      } else if (warp == 10) {
        ProduceQueriesAndRope<kCluster>(p, &q_map, &page_map, base, begin, end, rank);
      } else {
        ProducePairs<kCluster, 2, 4>(p, &page_map, base, begin, end, rank);
      }
    }
    __syncwarp();
  } else {
    RegistersUp<240>();
    Consumer<kCluster> consumer(p, base, warp / 4, warp % 4, lane, rank);
    int page = 0;
    for (int s = begin; s < end; ++s) {
      const DecodeSegment& segment = p.segments[s];
      const int pages = segment.pages;
      consumer.Segment(segment, s - begin, page);
      page += pages;
    }
  }
  // A block's shared memory must outlive the other's arrivals and copies into it.
  if (kCluster > 1) ClusterSync();
#endif
}

template <int kCluster>
cudaError_t Launch(const DecodeParams& params, const CUtensorMap& q_map, const CUtensorMap& page_map, int workers,
                   cudaStream_t stream) {
  const auto kernel = DecodeKernel<kCluster>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(workers * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, q_map, page_map);
}

}  // namespace

cudaError_t LaunchDecodeSm90(const DecodeParams& params, const CUtensorMap& q_map, const CUtensorMap& page_map,
                             int workers, int blocks_per_worker, cudaStream_t stream) {
  return (blocks_per_worker == 2 ? Launch<2> : Launch<1>)(params, q_map, page_map, workers, stream);
}

}  // namespace minke::cuda
