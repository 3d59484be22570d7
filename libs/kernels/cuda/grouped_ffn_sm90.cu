// Grouped SwiGLU for Hopper: both products in one persistent launch. docs/gpu_experts.md has the arithmetic.
//
// Weights are the left operand (64 rows of a product), pairs the right one (8 to 128 columns), so that few pairs cost few
// columns and weights stream at the rate of the memory. Blocks work in clusters of two. A cluster takes items from a
// counter: first all gate/up items, expert by expert, then all down items, which wait only for the gate/up items of
// their own expert; their weights are on the way meanwhile. Of an item, a block computes two units of weight rows (or
// one) for up to 128 pairs:
//   pair item: both blocks have the same units and different pairs; each fetches half of the weights for both.
//   solo item: the blocks have different units and the same pairs.
// e4m3 weights are multiplied as they are: a pair's activations come in two parts, side by side as two of the product's
// columns (grouped_ffn_kernels.h), whose sums are scaled and added up after every block of weights, which e4m3 sums need for
// their accuracy, too.
// Roles: two consumer warpgroups; of one more, a warp that takes items and fetches weights (bulk copies), and
// three that gather the pairs' rows of x (16-byte asynchronous copies) or fetch their gate/up results (bulk copies).
#include "libs/kernels/cuda/grouped_ffn_kernels.h"
#include "libs/kernels/cuda/grouped_ffn_split.cuh"
#include "libs/kernels/cuda/products.cuh"

namespace minke::cuda {
namespace {

using namespace ptx;

constexpr int kEarlyBlocks = 6;     // of each unit, asked for before the plan is there
constexpr int kEarlySlots = 4096;   // looked through for that
constexpr int kGroups = 2, kThreads = 128 * (kGroups + 1);  // of consumers, one of fetchers
constexpr int kGatherWarps = 3, kGatherRows = 4 * kGatherWarps;  // rows of x that are asked for at a time

// Of shared memory: 4 stages of 16 + 2 x 16 KiB (fp8: and a KiB of scales), and 20 KiB for the rest.
template <FfnFormat kFormat>
struct Layout {
  static constexpr bool kFP8 = kFormat == FfnFormat::kFP8;
  static constexpr int kStages = 4;
  static constexpr int kPairs = FfnTileRows(kFormat);
  static constexpr int kUnitBytes = FfnBlockBytes(kFormat);               // of one block of columns, in memory
  static constexpr int kLoadBytes = kFfnWeightBytes + (kFP8 ? kFfnScaleBytes : 0);
  static constexpr int kPairBytes = 128 * 128 + (kFP8 ? 1024 : 0);        // rows of pairs, then scales
  static constexpr int kWeights = kStages * kPairBytes;
  static constexpr int kScales = kWeights + kStages * 2 * kFfnWeightBytes;  // fp8: [stages, 2] of weights
  static constexpr int kStaging = kScales + (kFP8 ? kStages * 2 * kFfnScaleBytes : 0);
  static constexpr int kStagingBytes = 8192;                              // of a warpgroup
  static constexpr int kLargest = kStaging + kGroups * kStagingBytes;     // fp8: [kGroups, 4 warps, kPairs]
  static constexpr int kPairScales = kLargest + (kFP8 ? kGroups * 4 * kPairs * 4 : 0);  // fp8: [4 items, kPairs] of x
  static constexpr int kExperts = kPairScales + (kFP8 ? 4 * kPairs * 4 : 0);
  static constexpr int kWork = kExperts + (kGroupedFfnExpertsMax + 1) * 16;
  static constexpr int kClaim = kWork + 2 * 32;
  static constexpr int kFull = kClaim + 16;
  static constexpr int kEmpty = kFull + 8 * kStages;
  static constexpr int kReady = kEmpty + 8 * kStages;  // the other block's stage may be written
  static constexpr int kWorkFull = kReady + 8 * kStages;
  static constexpr int kWorkEmpty = kWorkFull + 16;
  static constexpr int kClaimFull = kWorkEmpty + 16;
  static constexpr int kClaimEmpty = kClaimFull + 16;
  static constexpr int kBytes = kClaimEmpty + 16;
  static_assert(kBytes <= 227 * 1024);
};

// One block's part of an item.
struct Work {
  int phase;  // 0: gate and up, 1: down, < 0: no more work
  int expert;
  int unit, units;  // the block's first unit; 0, 1 or 2 of them
  int row, rows;    // pairs
  int shared;       // the cluster shares the weights
  int blocks;       // of columns
};
static_assert(sizeof(Work) == 32);

// A position in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void LoadBulk(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void LoadBulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// More bytes for the phase under way; no arrival.
__device__ __forceinline__ void BarrierExpectMore(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Ordinary accesses to any memory before this come before what the copy engine does after it.
__device__ __forceinline__ void FenceAsync() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void LoadBulkMulticast(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}
__device__ __forceinline__ void PrefetchBulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// A word as part of the thread's copies; see GatherArrive.
__device__ __forceinline__ void GatherWord(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// A word and its arrival to the same places in block `rank` of the cluster.
__device__ __forceinline__ void SendWord(uint32_t to, int value, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 place, remote;\n"
      "mapa.shared::cluster.u32 place, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %1, [remote];\n"
      "}" ::"r"(to),
      "r"(value), "r"(barrier), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void GatherPiece(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ uint64_t EvictLast() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void StoreKeep(void* to, const uint4& v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "l"(policy)
               : "memory");
}
// One of the arrivals that the barrier counts, once this thread's copies have landed.
__device__ __forceinline__ void GatherArrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ int LoadAcquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void StoreMatrixTransposed4(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ uint4 LoadShared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ float2 LoadShared2(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint2 LoadSharedBits2(uint32_t from) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void StoreSharedBits2(uint32_t to, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void StoreSharedByte(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void Release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) BarrierArrive(barrier);
}

// The part of block `rank` in an item. Items grow, so the search goes on where it was.
template <int kPairs>
__device__ __forceinline__ Work Decode(const FfnParams& p, const FfnExpert* experts, int item, int rank, int solo_units,
                                       int& expert, int& phase) {
  const int items1 = experts[p.experts].items1, items2 = experts[p.experts].items2;
  Work work = {};
  work.phase = -1;
  if (item >= items1 + items2) return work;
  if (item >= items1 && phase == 0) phase = 1, expert = 0;
  const auto first = [&](int e) { return phase == 0 ? experts[e].items1 : items1 + experts[e].items2; };
  while (first(expert + 1) <= item) ++expert;
  const int units = phase == 0 ? p.units.units1 : p.units.units2;
  const int row = experts[expert].row, rows = experts[expert + 1].row - row;
  const int groups = (rows + kPairs - 1) / (2 * kPairs), local = item - first(expert);
  const int solo = local - groups * ((units + 1) / 2);
  work.phase = phase;
  work.expert = expert;
  work.blocks = phase == 0 ? p.units.blocks1 : p.units.blocks2;
  if (solo < 0) {
    // Groups of pairs that share weights are neighbours, so that the weights come from the L2 for all but the first.
    const int group = local % groups, here = min(2 * kPairs, rows - group * 2 * kPairs);
    const int half = ((here + 1) / 2 + 7) / 8 * 8;
    work.shared = 1;
    work.unit = local / groups * 2;
    work.units = min(2, units - work.unit);
    work.row = row + group * 2 * kPairs + rank * half;
    work.rows = rank == 0 ? half : here - half;
  } else {
    work.unit = (solo * 2 + rank) * solo_units;
    work.units = max(0, min(solo_units, units - work.unit));
    work.row = row + groups * 2 * kPairs;
    work.rows = rows - groups * 2 * kPairs;
  }
  return work;
}

__device__ __forceinline__ Work ReadWork(const uint8_t* shared, int at) {
  const int4* from = reinterpret_cast<const int4*>(shared + at);
  const int4 a = from[0], b = from[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Takes items, fetches weights. One thread.
template <FfnFormat kFormat>
__device__ __forceinline__ void Produce(const FfnParams& p, uint8_t* shared, uint32_t base, int rank) {
  using L = Layout<kFormat>;
  const FfnExpert* experts = reinterpret_cast<const FfnExpert*>(shared + L::kExperts);
  const int solo_units = p.tables.counters[1];
  const uint64_t once = EvictFirst();
  Ring<L::kStages> ring;
  uint32_t ready = 0;  // parities
  int expert = 0, phase = 0, next = blockIdx.x / 2;
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    const uint32_t parity = (n >> 1) & 1;
    // The first item has the cluster's number; block 0 tells the other one of each later one.
    if (n > 0) {
      const int place = (n - 1) & 1;
      const uint32_t turn = ((n - 1) >> 1) & 1, full = base + L::kClaimFull + 8 * place;
      if (rank == 0) {
        BarrierWait(base + L::kClaimEmpty + 8 * place, turn ^ 1);
        SendWord(base + L::kClaim + 4 * place, next, full, 1);
      } else {
        BarrierExpect(full, 4);
        BarrierWait(full, turn);
        next = *reinterpret_cast<volatile int*>(shared + L::kClaim + 4 * place);
        BarrierArriveRemote(base + L::kClaimEmpty + 8 * place, 0);
      }
    }
    const Work work = Decode<L::kPairs>(p, experts, next, rank, solo_units, expert, phase);
    BarrierWait(base + L::kWorkEmpty + 8 * slot, parity ^ 1);
    *reinterpret_cast<Work*>(shared + L::kWork + slot * 32) = work;
    BarrierArrive(base + L::kWorkFull + 8 * slot);
    if (work.phase < 0) break;
    const int64_t unit_bytes = static_cast<int64_t>(work.blocks) * L::kUnitBytes;
    const int units = work.phase == 0 ? p.units.units1 : p.units.units2;
    const uint8_t* from = (work.phase == 0 ? p.gate_up : p.down) +
                          (static_cast<int64_t>(work.expert) * units + work.unit) * unit_bytes;
    const int claim_at = max(0, work.blocks - 8);  // the next item is known when this one's last block is asked for
    for (int block = 0; block < work.blocks; ++block) {
      const uint32_t full = base + L::kFull + 8 * ring.stage;
      const uint32_t to = base + L::kWeights + ring.stage * 2 * kFfnWeightBytes;
      [[maybe_unused]] const uint32_t scales_to = base + L::kScales + ring.stage * 2 * kFfnScaleBytes;
      BarrierWait(base + L::kEmpty + 8 * ring.stage, ring.parity ^ 1);
      BarrierExpect(full, work.units * L::kLoadBytes);
      if (work.shared) {
        const uint32_t mine = base + L::kReady + 8 * ring.stage;
        BarrierArriveRemote(mine, rank ^ 1);
        BarrierWait(mine, (ready >> ring.stage) & 1);
        ready ^= 1u << ring.stage;
        if (rank < work.units) {
          const uint8_t* of = from + rank * unit_bytes;
          LoadBulkMulticast(to + rank * kFfnWeightBytes, of, kFfnWeightBytes, full);
          if constexpr (L::kFP8) {
            LoadBulkMulticast(scales_to + rank * kFfnScaleBytes, of + kFfnWeightBytes, kFfnScaleBytes, full);
          }
        }
      } else {
        for (int u = 0; u < work.units; ++u) {
          const uint8_t* of = from + u * unit_bytes;
          LoadBulk(to + u * kFfnWeightBytes, of, kFfnWeightBytes, full, once);
          if constexpr (L::kFP8) {
            LoadBulk(scales_to + u * kFfnScaleBytes, of + kFfnWeightBytes, kFfnScaleBytes, full, once);
          }
        }
      }
      from += L::kUnitBytes;
      if (block == claim_at && rank == 0) next = atomicAdd(p.tables.counters, 1);
      ring.Next();
    }
  }
}

// Of `rows` pairs of a tile in two parts.
__device__ __forceinline__ int SplitRows(int rows) { return (rows + 7) / 8 * 8; }
// Where a tile's pairs begin in `inner` in two parts, in pairs: an expert's at a multiple of 8, as are its tiles.
__device__ __forceinline__ int SplitPlace(const FfnExpert* experts, const Work& work) {
  const int first = experts[work.expert].row;
  return (first / 8 + work.expert) * 8 + work.row - first;
}

// Fetches the rows of the pairs. kGatherWarps warps: of x, a thread has one 16-byte column of every kGatherRows-th row.
template <FfnFormat kFormat>
__device__ __forceinline__ void Gather(const FfnParams& p, const uint8_t* shared, uint32_t base, int thread) {
  using L = Layout<kFormat>;
  const FfnExpert* experts = reinterpret_cast<const FfnExpert*>(shared + L::kExperts);
  const int lane = thread % 32, piece = thread % 8, first = thread / 8;
  // Row first + 12 i begins 128 (first + 12 i) bytes in, its pieces swapped by its number modulo 8.
  const uint32_t even = first * 128 + ((piece ^ (first & 7)) << 4), odd = first * 128 + ((piece ^ ((first + 4) & 7)) << 4);
  constexpr int kSteps = (128 + kGatherRows - 1) / kGatherRows;
  Ring<L::kStages> ring;
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    BarrierWait(base + L::kWorkFull + 8 * slot, (n >> 1) & 1);
    const Work work = ReadWork(shared, L::kWork + slot * 32);
    Release(base + L::kWorkEmpty + 8 * slot, lane);
    if (work.phase < 0) break;
    const int rows = work.units > 0 ? work.rows : 0;
    if (work.phase == 1) {
      // What the gate/up items of these pairs wrote lies as it will lie here, block after block.
      const int64_t bytes = L::kFP8 ? SplitRows(rows) * kFfnSplitPairBytes : rows * 128;
      if (thread == 0 && rows > 0) {
        const int want = 2 * kGroups * (experts[work.expert + 1].items1 - experts[work.expert].items1);
        while (LoadAcquire(p.tables.done + work.expert) < want) __nanosleep(32);
        FenceAsync();
      }
      const uint8_t* from = p.inner + (L::kFP8 ? SplitPlace(experts, work) * work.blocks * kFfnSplitPairBytes
                                               : static_cast<int64_t>(work.row) * work.blocks * 128);
      for (int block = 0; block < work.blocks; ++block, from += bytes) {
        const uint32_t full = base + L::kFull + 8 * ring.stage;
        BarrierWait(base + L::kEmpty + 8 * ring.stage, ring.parity ^ 1);
        if (thread == 0 && rows > 0) {
          BarrierExpectMore(full, static_cast<int>(bytes));
          LoadBulk(base + ring.stage * L::kPairBytes, from, static_cast<int>(bytes), full);
        }
        BarrierArrive(full);
        ring.Next();
      }
      continue;
    }
    uint32_t offsets[kSteps];  // in pieces of 16 bytes
    uint32_t wanted = 0;       // rows that are there
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = first + i * kGatherRows, pair = L::kFP8 ? row / 16 * 8 + row % 8 : row, part = row / 8 % 2;
      const bool there = pair < rows;
      const int source = there ? p.tables.pair_source[work.row + pair] : 0;
      wanted |= there ? 1u << i : 0;
      if constexpr (L::kFP8) {
        offsets[i] = (2 * source + part) * (work.blocks * 8) + piece;
        if (there && piece == 0 && part == 0) {
          GatherWord(base + L::kPairScales + ((n & 3) * L::kPairs + pair) * 4, p.part_scales + source);
        }
      } else {
        offsets[i] = source * (p.hidden / 8) + piece;
      }
    }
    const uint8_t* from = L::kFP8 ? p.parts : reinterpret_cast<const uint8_t*>(p.x);
    for (int block = 0; block < work.blocks; ++block, from += 128) {
      const uint32_t to = base + ring.stage * L::kPairBytes;
      const uint32_t to_even = to + even, to_odd = to + odd;
      BarrierWait(base + L::kEmpty + 8 * ring.stage, ring.parity ^ 1);
      if (L::kFP8 || block * 64 + 64 <= p.hidden) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (wanted >> i & 1) {
            GatherPiece(((i & 1) ? to_odd : to_even) + i * kGatherRows * 128,
                        from + static_cast<uint64_t>(offsets[i]) * 16, 16);
          }
        }
      } else {
        // Pieces past the last column become zero.
        const int bytes = block * 64 + piece * 8 < p.hidden ? 16 : 0;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (wanted >> i & 1) {
            GatherPiece(((i & 1) ? to_odd : to_even) + i * kGatherRows * 128,
                        bytes == 0 ? from : from + static_cast<uint64_t>(offsets[i]) * 16, bytes);
          }
        }
      }
      GatherArrive(base + L::kFull + 8 * ring.stage);
      ring.Next();
    }
  }
}

// d of `kTiles` times 64 weight rows and kN pairs. gathered: the pairs' rows were written as if by ordinary stores.
template <int kN, int kTiles>
__device__ __forceinline__ void Multiply(float (&d)[kTiles][kN / 2], uint32_t base, int blocks, bool gathered, int group,
                                         int lane, Ring<4>& ring) {
  using L = Layout<FfnFormat::kBF16>;
  // kTiles = 2: a unit for each warpgroup, 1: half a unit.
  const int part = group * (kTiles == 2 ? kFfnWeightBytes : kFfnWeightBytes / 2);
  // Set, not left to the first product: of what is unset, the compiler keeps every form's in registers between items.
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[t][i] = 0;
    Pin(d[t]);
  }
  int before = 0;
  for (int block = 0; block < blocks; ++block) {
    const uint32_t pairs = base + ring.stage * L::kPairBytes;
    const uint32_t weights = base + L::kWeights + ring.stage * 2 * kFfnWeightBytes + part;
    BarrierWait(base + L::kFull + 8 * ring.stage, ring.parity);
    if (gathered) FenceAsyncShared();
    ProductsBegin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ProductShared(d[t], Descriptor(weights + t * 8192 + k * 32, 1024, 16), Descriptor(pairs + k * 32, 1024, 16), 1);
      }
    }
    ProductsCommit();
    ProductsWait<1>();
    if (block > 0) Release(base + L::kEmpty + 8 * before, lane);
    before = ring.stage;
    ring.Next();
  }
  ProductsWait<0>();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) Pin(d[t]);
  Release(base + L::kEmpty + 8 * before, lane);
}

// sum += scale (first parts' sums + second parts' / 16), of kPairs pairs; `gate` and `up` scale the rows of a thread. kDown: so
// do the pairs' own scales, which lie at `pair_scales`.
template <int kPairs, bool kDown>
__device__ __forceinline__ void AddScaled(float (&sum)[kPairs / 2], float (&part)[kPairs], float2 scales,
                                          uint32_t pair_scales, int lane) {
  Pin(part);
#pragma unroll
  for (int g = 0; g < kPairs / 8; ++g) {
    float2 of_pair = make_float2(1.f, 1.f);
    if constexpr (kDown) {
      of_pair = LoadShared2(pair_scales + (8 * g + 2 * (lane % 4)) * 4);
      of_pair.x *= scales.x, of_pair.y *= scales.x;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = kDown ? (i % 2 == 0 ? of_pair.x : of_pair.y) : (i < 2 ? scales.x : scales.y);
      sum[4 * g + i] = fmaf(scale, fmaf(part[8 * g + 4 + i], 0.0625f, part[8 * g + i]), sum[4 * g + i]);
    }
  }
}

// The same of e4m3 weights, a unit's two tiles of 64 rows one after the other, so that one is multiplied while the other's
// sums are scaled and added up: of gate and up after every block, of down, whose pairs have a scale for every 64 columns,
// after half. The other warpgroup's products fill what is left.
template <int kPairs, bool kDown>
__device__ __forceinline__ void MultiplySplit(float (&sum)[2][kPairs / 2], uint32_t base, int blocks, int rows, int group,
                                              int lane, Ring<4>& ring) {
  using L = Layout<FfnFormat::kFP8>;
  constexpr int kHalves = kDown ? 2 : 1, kSteps = 4 / kHalves;
  float part[2][kPairs];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) sum[t][i] = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) part[t][i] = 0;
    Pin(sum[t]);
    Pin(part[t]);
  }
  const int rows8 = SplitRows(rows);
  for (int block = 0; block < blocks; ++block) {
    const uint32_t pairs = base + ring.stage * L::kPairBytes;
    const uint32_t weights = base + L::kWeights + (ring.stage * 2 + group) * kFfnWeightBytes;
    BarrierWait(base + L::kFull + 8 * ring.stage, ring.parity);
    if (!kDown) FenceAsyncShared();
    const float2 scales = LoadShared2(base + L::kScales + (ring.stage * 2 + group) * kFfnScaleBytes);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      ProductsBegin();
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int k = half * kSteps; k < (half + 1) * kSteps; ++k) {
          ProductE4M3(part[t], Descriptor(weights + t * 8192 + k * 32, 1024, 16), Descriptor(pairs + k * 32, 1024, 16),
                      k > half * kSteps);
        }
        ProductsCommit();
      }
      const uint32_t pair_scales = pairs + rows8 * (256 + half * 4);
      ProductsWait<1>();
      AddScaled<kPairs, kDown>(sum[0], part[0], scales, pair_scales, lane);
      ProductsWait<0>();
      AddScaled<kPairs, kDown>(sum[1], part[1], scales, pair_scales, lane);
    }
    Release(base + L::kEmpty + 8 * ring.stage, lane);
    ring.Next();
  }
}

__device__ __forceinline__ float Swish(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// Turns d around through shared memory, so that rows of pairs leave in whole pieces of 128 bytes or more.
template <int kN, int kTiles, bool kDown, int kStagingBytes>
__device__ __forceinline__ void Store(const float (&d)[kTiles][kN / 2], const FfnParams& p, const Work& work,
                                      uint32_t staging, int group, int warp, int lane) {
  constexpr int kPieces = kTiles * (kDown ? 8 : 4);  // of 16 bytes, of a pair
  constexpr int kRoom = kStagingBytes / (kPieces * 16), kRows = kN < kRoom ? kN : kRoom, kBlocks = kRows / 8;
  constexpr int kStep = kDown ? 2 : 4;  // blocks of 8 pairs in one store
  const int thread = warp * 32 + lane, matrix = lane / 8;
  const int column = work.unit * 128 + group * 64 * kTiles;  // of the down product
  // The gate/up product leaves in the order in which it is fetched: tile, block of 64 columns, row, pieces swapped.
  const int block = work.unit + (kTiles == 2 ? group : 0), first_piece = kTiles == 2 ? 0 : group * 4;
  const int64_t row = work.row;
  uint8_t* out = kDown ? reinterpret_cast<uint8_t*>(p.pairs) + (row * p.hidden + column) * 2
                       : p.inner + (row * p.units.blocks2 + work.rows * block) * 128;
  const uint64_t keep = EvictLast();
  const auto at = [](int row, int piece) {
    const int turn = kPieces >= 8 ? row & 7 : (row >> 1) & 3;
    return row * kPieces * 16 + ((piece ^ turn) << 4);
  };
#pragma unroll
  for (int first = 0; first < kN; first += kRows) {
    if (first >= work.rows) break;
    NamedSync<128>(1 + group);  // the rows before have left
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kBlocks; i += kStep) {
        const auto block = [&](int j) { return (i + j) % kBlocks; };
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* v = d[t] + first / 2 + 4 * block(kDown ? j / 2 : j);
          packed[j] = kDown ? PackBF16(v[j % 2 * 2], v[j % 2 * 2 + 1]) : PackBF16(Swish(v[0], v[2]), Swish(v[1], v[3]));
        }
        const int row = 8 * block(kDown ? matrix / 2 : matrix) + lane % 8;
        const int piece = kDown ? t * 8 + warp * 2 + matrix % 2 : t * 4 + warp;
        StoreMatrixTransposed4(staging + at(row, piece), packed[0], packed[1], packed[2], packed[3]);
      }
    }
    NamedSync<128>(1 + group);
#pragma unroll
    for (int i = thread; i < kRows * kPieces; i += 128) {
      const int row = i / kPieces, piece = i % kPieces;
      if (first + row < work.rows && (!kDown || column + piece * 8 < p.hidden)) {
        uint8_t* to = kDown ? out + static_cast<int64_t>(first + row) * p.hidden * 2 + piece * 16
                            : out + (first + row) * 128 + (((piece + first_piece) ^ (row & 7)) << 4);
        const uint4 v = LoadShared(staging + at(row, piece));
        if (work.shared) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          StoreKeep(to, v, keep);
        }
      }
    }
  }
}

// silu(gate) * up of a unit in two parts, in the order in which they are fetched. gate and up still lack the scales of their
// pairs' x.
template <int kPairs>
__device__ __forceinline__ void StoreSplit(const float (&sum)[2][kPairs / 2], const FfnParams& p, const FfnExpert* experts,
                                           const Work& work, uint32_t base, int item, int group, int warp, int lane) {
  using L = Layout<FfnFormat::kFP8>;
  constexpr int kEights = kPairs / 8;
  const int thread = warp * 32 + lane, pair = 2 * (lane % 4), rows8 = SplitRows(work.rows);
  const uint32_t x_scales = base + L::kPairScales + (item & 3) * L::kPairs * 4;
  const uint32_t largest_of = base + L::kLargest + group * 4 * L::kPairs * 4;
  const uint32_t staging = base + L::kStaging + group * L::kStagingBytes;
  float value[2][kEights][2];
#pragma unroll
  for (int g = 0; g < kEights; ++g) {
    const float2 x_scale = LoadShared2(x_scales + (8 * g + pair) * 4);
    uint32_t largest[2] = {};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = i == 0 ? x_scale.x : x_scale.y;
        const float exact = Swish(sum[t][4 * g + i] * scale, sum[t][4 * g + 2 + i] * scale);
        value[t][g][i] = __bfloat162float(__float2bfloat16(exact));
        largest[i] = max(largest[i], __float_as_uint(value[t][g][i]) & 0x7fffffffu);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], d));
    }
    if (lane < 4) StoreSharedBits2(largest_of + (warp * L::kPairs + 8 * g + pair) * 4, make_uint2(largest[0], largest[1]));
  }
  NamedSync<128>(1 + group);  // and the rows before have left
  const int unit = work.unit + group, half = unit % 2;
  uint8_t* const out = p.inner + (static_cast<int64_t>(SplitPlace(experts, work)) * p.units.blocks2 + unit / 2 * rows8) *
                                     kFfnSplitPairBytes;
  float* const out_scales = reinterpret_cast<float*>(out + rows8 * 256);
#pragma unroll
  for (int g = 0; g < kEights; ++g) {
    if (8 * g >= rows8) break;
    uint2 largest = make_uint2(0, 0);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint2 of_warp = LoadSharedBits2(largest_of + (w * L::kPairs + 8 * g + pair) * 4);
      largest.x = max(largest.x, of_warp.x), largest.y = max(largest.y, of_warp.y);
    }
    const SplitScale scale[2] = {SplitScale(largest.x), SplitScale(largest.y)};
    if (warp == g % 4 && lane < 4) {
      *reinterpret_cast<float2*>(out_scales + half * rows8 + 8 * g + pair) = make_float2(scale[0].scale, scale[1].scale);
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      uint32_t first, second;
      Split(value[t][g][0] * scale[0].inverse, value[t][g][1] * scale[1].inverse, first, second);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Staged: rows of 64 bytes, pieces swapped by bits 1 and 2 of the row.
        const int row = 16 * g + pair + i, byte = warp % 2 * 8 + lane / 4;
        const uint32_t to = staging + row * 64 + (((t * 2 + warp / 2) ^ (row >> 1 & 3)) << 4) + byte;
        StoreSharedByte(to, first >> 8 * i & 0xff);
        StoreSharedByte(to + 8 * 64, second >> 8 * i & 0xff);
      }
    }
  }
  NamedSync<128>(1 + group);
  const uint64_t keep = EvictLast();
  const bool alone = half == 0 && unit + 1 == p.units.units1;  // nobody else writes the block's other half
  for (int i = thread; i < 2 * rows8 * 4; i += 128) {
    const int row = i / 4, piece = i % 4;
    const uint4 v = LoadShared(staging + row * 64 + ((piece ^ (row >> 1 & 3)) << 4));
    uint8_t* to = out + row * 128 + (((half * 4 + piece) ^ (row & 7)) << 4);
    if (work.shared) {
      *reinterpret_cast<uint4*>(to) = v;
    } else {
      StoreKeep(to, v, keep);
    }
    if (alone) *reinterpret_cast<uint4*>(out + row * 128 + (((4 + piece) ^ (row & 7)) << 4)) = make_uint4(0, 0, 0, 0);
  }
  if (alone) {
    for (int i = thread; i < rows8; i += 128) out_scales[rows8 + i] = 0;
  }
}

template <int kN, int kTiles>
__device__ __forceinline__ void Compute(const FfnParams& p, const Work& work, uint32_t base, int group, int warp, int lane,
                                        Ring<4>& ring) {
  using L = Layout<FfnFormat::kBF16>;
  // Otherwise the addresses of every form are kept in registers from item to item.
  asm volatile("" : "+r"(warp), "+r"(lane), "+r"(base), "+r"(group));
  float d[kTiles][kN / 2];
  Multiply<kN, kTiles>(d, base, work.blocks, work.phase == 0, group, lane, ring);
  asm volatile("" : "+r"(warp), "+r"(lane), "+r"(base), "+r"(group));
  const uint32_t staging = base + L::kStaging + group * L::kStagingBytes;
  if (work.phase == 0) {
    Store<kN, kTiles, false, L::kStagingBytes>(d, p, work, staging, group, warp, lane);
  } else {
    Store<kN, kTiles, true, L::kStagingBytes>(d, p, work, staging, group, warp, lane);
  }
}

template <int kPairs>
__device__ __forceinline__ void ComputeSplit(const FfnParams& p, const FfnExpert* experts, const Work& work, uint32_t base,
                                             int item, int group, int warp, int lane, Ring<4>& ring) {
  using L = Layout<FfnFormat::kFP8>;
  asm volatile("" : "+r"(warp), "+r"(lane), "+r"(base), "+r"(group));
  float sum[2][kPairs / 2];
  if (work.phase == 0) {
    MultiplySplit<kPairs, false>(sum, base, work.blocks, work.rows, group, lane, ring);
    asm volatile("" : "+r"(warp), "+r"(lane), "+r"(base), "+r"(group));
    StoreSplit<kPairs>(sum, p, experts, work, base, item, group, warp, lane);
  } else {
    MultiplySplit<kPairs, true>(sum, base, work.blocks, work.rows, group, lane, ring);
    asm volatile("" : "+r"(warp), "+r"(lane), "+r"(base), "+r"(group));
    const uint32_t staging = base + L::kStaging + group * L::kStagingBytes;
    Store<kPairs, 2, true, L::kStagingBytes>(sum, p, work, staging, group, warp, lane);
  }
}

template <int kTiles>
__device__ __forceinline__ void ComputeRows(const FfnParams& p, const Work& work, uint32_t base, int group, int warp,
                                            int lane, Ring<4>& ring) {
  if (work.rows <= 8) {
    Compute<8, kTiles>(p, work, base, group, warp, lane, ring);
  } else if (work.rows <= 16) {
    Compute<16, kTiles>(p, work, base, group, warp, lane, ring);
  } else if (work.rows <= 32) {
    Compute<32, kTiles>(p, work, base, group, warp, lane, ring);
  } else if (work.rows <= 64) {
    Compute<64, kTiles>(p, work, base, group, warp, lane, ring);
  } else {
    Compute<128, kTiles>(p, work, base, group, warp, lane, ring);
  }
}
__device__ __forceinline__ void ComputeRowsSplit(const FfnParams& p, const FfnExpert* experts, const Work& work,
                                                 uint32_t base, int item, int group, int warp, int lane, Ring<4>& ring) {
  if (work.rows <= 8) {
    ComputeSplit<8>(p, experts, work, base, item, group, warp, lane, ring);
  } else if (work.rows <= 16) {
    ComputeSplit<16>(p, experts, work, base, item, group, warp, lane, ring);
  } else if (work.rows <= 32) {
    ComputeSplit<32>(p, experts, work, base, item, group, warp, lane, ring);
  } else {
    ComputeSplit<64>(p, experts, work, base, item, group, warp, lane, ring);
  }
}

template <FfnFormat kFormat>
__device__ __forceinline__ void Consume(const FfnParams& p, const uint8_t* shared, uint32_t base, int group, int warp,
                                        int lane) {
  using L = Layout<kFormat>;
  Ring<L::kStages> ring;
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    BarrierWait(base + L::kWorkFull + 8 * slot, (n >> 1) & 1);
    const Work work = ReadWork(shared, L::kWork + slot * 32);
    Release(base + L::kWorkEmpty + 8 * slot, lane);
    if (work.phase < 0) break;
    bool computes = work.units > 0;
    if constexpr (L::kFP8) {
      computes = group < work.units;  // two warpgroups do not share a unit, whose scales are of all its columns
      if (computes) {
        const FfnExpert* experts = reinterpret_cast<const FfnExpert*>(shared + L::kExperts);
        ComputeRowsSplit(p, experts, work, base, n, group, warp, lane, ring);
      }
    } else if (work.units == 1) {
      ComputeRows<1>(p, work, base, group, warp, lane, ring);
    } else if (work.units == 2) {
      ComputeRows<2>(p, work, base, group, warp, lane, ring);
    }
    if (!computes) {
      for (int block = 0; block < work.blocks; ++block) {
        BarrierWait(base + L::kFull + 8 * ring.stage, ring.parity);
        Release(base + L::kEmpty + 8 * ring.stage, lane);
        ring.Next();
      }
    }
    if (work.phase == 0) {
      FenceAsync();
      NamedSync<128>(1 + group);  // all rows of this warpgroup are written
      if (warp == 0 && lane == 0) {
        __threadfence();
        atomicAdd(p.tables.done + work.expert, 1);
      }
    }
  }
}

// While the plan is being made: brings the weights of the block's first item into the L2, as the item will be if every
// expert has pairs, none more than fill a tile. Only where that expert is among the first slots, so that a few pairs do not
// pay for weights of others.
template <FfnFormat kFormat>
__device__ __forceinline__ void FetchEarly(const FfnParams& p) {
  using L = Layout<kFormat>;
  const int items = (p.units.units1 + 3) / 4, cluster = blockIdx.x / 2, expert = cluster / items;
  if (expert >= p.experts) return;
  bool wanted = false;
  for (int i = threadIdx.x; i < min(p.slots, kEarlySlots); i += kThreads) wanted |= p.expert_of[i] == expert;
  if (__syncthreads_or(wanted) && threadIdx.x < 2) {
    const int unit = (cluster % items * 2 + blockIdx.x % 2) * 2 + threadIdx.x;
    if (unit < p.units.units1) {
      const int64_t from = (static_cast<int64_t>(expert) * p.units.units1 + unit) * p.units.blocks1 * L::kUnitBytes;
      PrefetchBulk(p.gate_up + from, min(kEarlyBlocks, p.units.blocks1) * L::kUnitBytes);
    }
  }
}

template <FfnFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) FfnKernel(const FfnParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kFormat>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  LaunchDependents();
  if (threadIdx.x == 0) {
    if (base % 1024 != 0) __trap();
    for (int i = 0; i < L::kStages; ++i) {
      BarrierInit(base + L::kFull + 8 * i, 1 + 32 * kGatherWarps);
      BarrierInit(base + L::kEmpty + 8 * i, 4 * kGroups);
      BarrierInit(base + L::kReady + 8 * i, 1);
    }
    for (int i = 0; i < 2; ++i) {
      BarrierInit(base + L::kWorkFull + 8 * i, 1);
      BarrierInit(base + L::kWorkEmpty + 8 * i, 4 * kGroups + kGatherWarps);
      BarrierInit(base + L::kClaimFull + 8 * i, 1);
      BarrierInit(base + L::kClaimEmpty + 8 * i, 1);
    }
    FenceBarrierInit();
  }
  FetchEarly<kFormat>(p);
  DependentWait();
  for (int i = threadIdx.x; i <= p.experts; i += kThreads) {
    reinterpret_cast<int4*>(shared + L::kExperts)[i] = reinterpret_cast<const int4*>(p.tables.experts)[i];
  }
  __syncthreads();
  ClusterSync();
  constexpr int kConsumers = 4 * kGroups;  // warps
  // Of the registers that the block began with, 168 a thread: who asks for more than the others gave back waits for ever.
  static_assert(256 * 232 + 128 * 40 <= 384 * 168 && 256 * 224 + 128 * 48 <= 384 * 168);
  if (warp >= kConsumers) {
    RegistersDown<48>();
    if (warp == kConsumers) {
      if (lane == 0) Produce<kFormat>(p, shared, base, ClusterRank());
    } else {
      Gather<kFormat>(p, shared, base, threadIdx.x - (kConsumers + 1) * 32);
    }
    __syncwarp();
    ClusterSync();  // the other block may still arrive at barriers here
  } else {
    RegistersUp<L::kFP8 ? 224 : 224>();
    Consume<kFormat>(p, shared, base, warp / 4, warp % 4, lane);
    __syncwarp();
    ClusterSync();
  }
#endif
}

template <FfnFormat kFormat>
cudaError_t Launch(const FfnParams& params, int multiprocessors, cudaStream_t stream) {
  const auto kernel = FfnKernel<kFormat>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kFormat>::kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors / 2 * 2);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Layout<kFormat>::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = 2;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace

cudaError_t LaunchFfnSm90(const FfnParams& params, FfnFormat format, int multiprocessors, cudaStream_t stream) {
  switch (format) {
    case FfnFormat::kBF16:
      return Launch<FfnFormat::kBF16>(params, multiprocessors, stream);
    case FfnFormat::kFP8:
      return Launch<FfnFormat::kFP8>(params, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace minke::cuda
