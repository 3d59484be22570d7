// The tensors a checkpoint of a given configuration must have: names, shapes, and the service that holds
// each.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libs/model/config.h"

namespace minke {

enum class TensorRole { kAttention, kRouter, kExpert };

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;  // [out, in] of a linear layer, [n] of a norm
  TensorRole role;
  int32_t layer = -1;   // -1: not in a layer
  int32_t expert = -1;  // routed expert, -1: none
};

// In file order: embedding, layers, final norm, head.
std::vector<TensorSpec> ExpectedTensors(const ModelConfig& config);

// "model.layers.L."
std::string LayerPrefix(int32_t layer);
// "model.layers.L.mlp.experts.E."
std::string ExpertPrefix(int32_t layer, int32_t expert);

}  // namespace minke
