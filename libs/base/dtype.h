// Number formats of weights and activations.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace minke {

// Brain float: the upper half of an f32.
using bf16 = uint16_t;

inline float BF16ToF32(bf16 bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest even; NaN stays NaN.
inline bf16 F32ToBF16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((u >> 16) | 0x40);
  return static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

float F16ToF32(uint16_t bits);

// How a cluster computes: one choice for all its processes, checked when they shake hands.
enum class Precision : uint8_t {
  kExact = 0,  // f32 weights and activations, one form of every reduction: the same bits on any placement
  kBF16 = 1,   // bf16 weights, activations and cache, f32 accumulation
};

inline std::string_view ToString(Precision precision) {
  switch (precision) {
    case Precision::kExact:
      return "exact";
    case Precision::kBF16:
      return "bf16";
  }
  return "?";
}

inline int64_t ActivationBytes(Precision precision) { return precision == Precision::kExact ? 4 : 2; }

}  // namespace minke
