// What the CPU can do at most, once per instruction set: multiply-adds that never leave the registers, and
// reads that do nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "libs/kernels/cpu/tile_kernels.h"

namespace minke::kernels::bench {

struct CeilingLoops {
  // `rounds` of independent multiply-adds in registers; the result only keeps the compiler from dropping
  // them.
  struct Flops {
    float (*run)(int64_t rounds, float x, float y);  // nullptr: the instruction set has none
    double flops_per_round;
  };
  Flops f32, bf16_dot;

  // Reads all of [begin, begin + bytes), `bytes` a multiple of 4 KiB, as one stream or as four that advance
  // together, without and with prefetches. The result is the xor of it all.
  static constexpr int kReadPatterns = 4;
  uint64_t (*read[kReadPatterns])(const std::byte* begin, int64_t bytes);
};

inline constexpr const char* kReadPatternNames[CeilingLoops::kReadPatterns] = {
    "1 stream", "1 stream, prefetched", "4 streams", "4 streams, prefetched"};

// REQUIRES: IsaSupported(isa).
const CeilingLoops& CeilingLoopsFor(Isa isa);

}  // namespace minke::kernels::bench
