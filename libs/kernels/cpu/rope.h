// Rotary position embedding with YaRN, on adjacent pairs (x[2i], x[2i+1]), the layout of published
// checkpoints. Source: docs/mathematics.md, arXiv 2309.00071.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libs/model/config.h"

namespace minke::kernels {

// Immutable; thread-safe.
class Rope {
 public:
  explicit Rope(const ModelConfig& config);
  std::span<const double> inv_freq() const { return inv_freq_; }  // [rope_dim / 2], radians per position
  double magnitude() const { return magnitude_; }                 // of every cosine and sine
  int64_t half_dim() const { return static_cast<int64_t>(inv_freq_.size()); }

  // cos_sin [rope_dim]: cosines of all pairs, then sines, of one position. Angles are built in double: in f32
  // the angle at position 100,000 would be off by 0.004 rad.
  void Angles(int64_t position, float* cos_sin) const;

 private:
  std::vector<double> inv_freq_;
  double magnitude_ = 1;  // m(mscale) / m(mscale_all_dim), 1 in every published configuration
};

// Rotates x [rope_dim] in place.
void ApplyRope(const float* cos_sin, int64_t half_dim, float* x);

}  // namespace minke::kernels
