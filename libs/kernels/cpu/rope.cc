#include "libs/kernels/cpu/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace minke::kernels {
namespace {

double YarnMagnitude(double factor, double mscale) {
  return factor > 1 && mscale != 0 ? 0.1 * mscale * std::log(factor) + 1.0 : 1.0;
}

}  // namespace

Rope::Rope(const ModelConfig& config) {
  const int32_t dim = config.qk_rope_head_dim;
  const double base = config.rope_theta;
  for (int32_t i = 0; i < dim / 2; ++i) inv_freq_.push_back(std::pow(base, -2.0 * i / dim));
  if (!config.yarn) return;
  const YarnConfig& yarn = *config.yarn;
  // Dimension whose wavelength makes `rotations` turns over the original context.
  const auto dimension = [&](double rotations) {
    return dim * std::log(yarn.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(base));
  };
  const double low = std::max(std::floor(dimension(yarn.beta_fast)), 0.0);
  const double high = std::min(std::ceil(dimension(yarn.beta_slow)), dim - 1.0);
  for (int32_t i = 0; i < dim / 2; ++i) {
    const double ramp = std::clamp((i - low) / std::max(high - low, 0.001), 0.0, 1.0);  // 1: interpolate
    inv_freq_[i] = inv_freq_[i] / yarn.factor * ramp + inv_freq_[i] * (1 - ramp);
  }
  magnitude_ = YarnMagnitude(yarn.factor, yarn.mscale) / YarnMagnitude(yarn.factor, yarn.mscale_all_dim);
}

void Rope::Angles(int64_t position, float* cos_sin) const {
  const int64_t half = half_dim();
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * inv_freq_[i];
    cos_sin[i] = static_cast<float>(std::cos(angle) * magnitude_);
    cos_sin[half + i] = static_cast<float>(std::sin(angle) * magnitude_);
  }
}

void ApplyRope(const float* cos_sin, int64_t half_dim, float* x) {
  for (int64_t i = 0; i < half_dim; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1], c = cos_sin[i], s = cos_sin[half_dim + i];
    x[2 * i] = even * c - odd * s;
    x[2 * i + 1] = even * s + odd * c;
  }
}

}  // namespace minke::kernels
