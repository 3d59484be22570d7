// Shape of the rows a model's cluster exchanges, and how many go into one message.
#pragma once

#include <algorithm>

#include "libs/base/dtype.h"
#include "libs/model/config.h"
#include "libs/wire/messages.h"

namespace minke {

inline wire::RowShape RowShapeOf(const ModelConfig& config, Precision precision) {
  return {.hidden = config.hidden_size,
          .top_k = config.num_experts_per_tok,
          .num_experts = config.n_routed_experts,
          .num_groups = config.n_routed_experts > 0 ? config.placement_groups() : 0,
          .activation_bytes = static_cast<int32_t>(ActivationBytes(precision))};
}

// Rows of one Dispatch or ExpertWork: they, their RoutePlan and their partials fit a message each, and they
// stay well below a peer's credit.
inline int32_t MessageRowsMax(const wire::RowShape& shape) {
  constexpr int32_t kRowsMax = 1024;  // of 4096 rows of credit
  return std::min(
      {kRowsMax, wire::DispatchRowsMax(shape), wire::WorkRowsMax(shape), wire::RoutePlanRowsMax(shape)});
}

}  // namespace minke
