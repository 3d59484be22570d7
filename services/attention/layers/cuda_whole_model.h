// Everything on one GPU, the routed experts too: AttentionModel::whole() is there.
#pragma once

#include <memory>

#include "libs/model/checkpoint.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

// On the calling thread's GPU. Weights are read by Prepare; fp8_experts: the routed experts' are rounded to
// e4m3 then (docs/gpu_experts.md).
std::unique_ptr<AttentionModel> MakeCudaWholeModel(std::shared_ptr<const Checkpoint> checkpoint,
                                                   bool fp8_experts);

}  // namespace minke::attention
