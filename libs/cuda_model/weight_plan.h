// Which tensors an attention node keeps on a GPU, of which part, and where: one list, in the one order in
// which they are read from a checkpoint and sent from one node to another.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libs/cuda_model/weights.h"

namespace minke::cuda_model {

struct PlannedTensor {
  std::string name;            // in the checkpoint
  std::vector<int64_t> shape;  // there: [rows, columns], or [count] of a norm
  MatrixPart part;             // what is kept of a matrix
  bool f32 = false;            // a norm: kept whole, as f32
  // Its buffer: a member of the model's weights, or of a layer's; and where in it.
  int32_t layer = -1;
  DeviceBuffer AttentionWeights::*model_buffer = nullptr;
  DeviceBuffer LayerWeights::*layer_buffer = nullptr;
  int64_t offset = 0, bytes = 0;
  int64_t buffer_bytes = 0;  // of all tensors in that buffer; the first one has offset 0

  DeviceBuffer& BufferIn(AttentionWeights& weights) const {
    return layer < 0 ? weights.*model_buffer : weights.layers[layer].*layer_buffer;
  }
  const DeviceBuffer& BufferIn(const AttentionWeights& weights) const {
    return BufferIn(const_cast<AttentionWeights&>(weights));
  }
};

// The order: embedding, final norm, head (unless tied); then layer by layer its norms, queries and latent,
// W_UQ, W_UKV, W_O, and gate, up and down of its dense block or shared experts. `config`: the model's, with
// all heads.
std::vector<PlannedTensor> PlanWeights(const ModelConfig& config, kernels::Share share);

// Puts every tensor into its buffer, in order; the buffers are there. `progress` is told of a layer's last
// one.
absl::Status ReadPlanned(const std::vector<PlannedTensor>& plan, WeightSource& source, const Stream& stream,
                         AttentionWeights& weights, absl::FunctionRef<void(int32_t layer)> progress);

// Differs between plans that differ in a name, a type or a size.
uint64_t ChecksumOf(const std::vector<PlannedTensor>& plan);

}  // namespace minke::cuda_model
