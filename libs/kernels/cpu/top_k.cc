#include "libs/kernels/cpu/top_k.h"

#include <algorithm>
#include <cmath>

#include "libs/base/status.h"

namespace minke::kernels {

namespace {

absl::Status CheckFinite(const ModelConfig& config, const float* logits) {
  for (int32_t e = 0; e < config.n_routed_experts; ++e) {
    if (!std::isfinite(logits[e])) {
      return absl::InvalidArgumentError(
          StrCat("gate logit of expert ", e, ": expected finite, found ", logits[e]));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WeighExperts(const ModelConfig& config, const float* logits, float* p, const uint16_t* experts,
                          float* weights) {
  const int32_t num_experts = config.n_routed_experts, k = config.num_experts_per_tok;
  MK_RETURN_IF_ERROR(CheckFinite(config, logits));
  const float maximum = *std::max_element(logits, logits + num_experts);
  float sum = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    p[e] = std::exp(logits[e] - maximum);
    sum += p[e];
  }
  for (int32_t e = 0; e < num_experts; ++e) p[e] /= sum;

  if (config.norm_topk_prob && k > 1) {
    float total = 0;
    for (int32_t i = 0; i < k; ++i) total += p[experts[i]];
    for (int32_t i = 0; i < k; ++i) weights[i] = p[experts[i]] / (total + 1e-20f);
  } else {
    for (int32_t i = 0; i < k; ++i)
      weights[i] = p[experts[i]] * static_cast<float>(config.routed_scaling_factor);
  }
  return absl::OkStatus();
}

absl::Status RouteToken(const ModelConfig& config, const float* logits, float* p, uint16_t* experts,
                        float* weights) {
  const int32_t num_experts = config.n_routed_experts, k = config.num_experts_per_tok;
  MK_RETURN_IF_ERROR(CheckFinite(config, logits));
  // Candidates are ordered by logit, which underflow cannot tie; equal logits keep the lower index.
  uint64_t kept_groups = ~uint64_t{0};
  int32_t group_size = num_experts;
  if (config.topk_method == TopkMethod::kGroupLimitedGreedy) {
    group_size = num_experts / config.n_group;
    kept_groups = 0;
    for (int32_t round = 0; round < config.topk_group; ++round) {
      int32_t best_group = -1;
      float best = -INFINITY;
      for (int32_t g = 0; g < config.n_group; ++g) {
        if (kept_groups >> g & 1) continue;
        const float score = *std::max_element(logits + g * group_size, logits + (g + 1) * group_size);
        if (score > best) best = score, best_group = g;
      }
      kept_groups |= uint64_t{1} << best_group;
    }
  }
  int32_t count = 0;
  for (int32_t e = 0; e < num_experts; ++e) {  // insertion into the best k so far, descending
    if (!(kept_groups >> (e / group_size) & 1)) continue;
    int32_t at = std::min(count, k - 1);
    if (count == k && logits[e] <= logits[experts[at]]) continue;
    while (at > 0 && logits[e] > logits[experts[at - 1]]) {
      experts[at] = experts[at - 1];
      --at;
    }
    experts[at] = static_cast<uint16_t>(e);
    count = std::min(count + 1, k);
  }
  MK_CHECK(count == k);
  std::sort(experts, experts + k);
  return WeighExperts(config, logits, p, experts, weights);
}

}  // namespace minke::kernels
