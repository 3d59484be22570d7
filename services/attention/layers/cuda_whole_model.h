// Everything on one GPU, the routed experts too: AttentionModel::whole() is there.
#pragma once

#include <memory>

#include "libs/model/checkpoint.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

// On the calling thread's GPU. Weights are read by Prepare.
std::unique_ptr<AttentionModel> MakeCudaWholeModel(std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace minke::attention
