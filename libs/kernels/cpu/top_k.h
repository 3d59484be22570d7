// DeepSeek-V2 routing of one token: softmax over all experts, device-limited top-k. Source: arXiv 2405.04434,
// section 2.2; docs/mathematics.md.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "libs/model/config.h"

namespace minke::kernels {

// logits [n_routed_experts] f32 -> experts [k] ascending, weights [k] = p * routed_scaling_factor (or
// renormalised, if the configuration says so). `scratch` [n_routed_experts].
// A group's score is its best expert's probability; groups not among the topk_group best are excluded
// outright (not set to 0, which underflowing probabilities could tie with). Ties keep the lower index.
// INVALID_ARGUMENT if a logit is NaN or infinite.
absl::Status RouteToken(const ModelConfig& config, const float* logits, float* scratch, uint16_t* experts,
                        float* weights);

// The weights of experts chosen by somebody else: the second half of RouteToken. Same errors.
absl::Status WeighExperts(const ModelConfig& config, const float* logits, float* scratch,
                          const uint16_t* experts, float* weights);

}  // namespace minke::kernels
