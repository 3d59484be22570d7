// Random numbers that are the same on every machine and compiler, unlike the distributions of <random>.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace minke::cli::bench {

// What is drawn: each has a sequence of its own, so that asking for longer answers leaves the prompts alone.
enum class Draw : uint64_t { kPromptTokens = 1, kOutputTokens, kPrompt, kSharedPrefix, kArrival };

// SplitMix64. Cheap to seed: every request has its own, and so is the same whatever ran before it.
// Thread-compatible.
class Random {
 public:
  Random(uint64_t seed, Draw draw, int64_t index)
      : state_(Mixed(Mixed(Mixed(seed) ^ static_cast<uint64_t>(draw)) ^ static_cast<uint64_t>(index))) {}

  uint64_t Next() { return Mixed(state_ += kGamma); }
  // In [0, 1).
  double Fraction() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  // In [first, last]. The bias of the product is below 2^-40 for ranges of up to 2^24.
  int64_t Between(int64_t first, int64_t last) {
    const auto range = static_cast<unsigned __int128>(last - first) + 1;
    return first + static_cast<int64_t>(range * Next() >> 64);
  }
  // Mean 1.
  double Exponential() { return -std::log(1 - Fraction()); }
  // Mean 0, variance 1 (Box and Muller; the second of the pair is thrown away).
  double Normal() {
    const double radius = std::sqrt(2 * Exponential());
    return radius * std::cos(2 * std::numbers::pi * Fraction());
  }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;
  static uint64_t Mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

}  // namespace minke::cli::bench
