// An attention node's part of the model on a GPU, or a rank's share of it.
#pragma once

#include <memory>

#include "libs/collective/device_collective.h"
#include "libs/cuda_model/weights.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

// On GPU `device`, which has the weights. `group`: among the ranks whose share they are; null: alone.
std::unique_ptr<AttentionModel> MakeCudaAttentionModel(ModelConfig config, int device,
                                                       cuda_model::AttentionWeights weights,
                                                       std::unique_ptr<DeviceCollective> group);

}  // namespace minke::attention
