// A model's weights in device memory, as bf16 (norms f32), in the layout of the checkpoint: cuBLASLt reads it
// as it is.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/grouped_ffn.h"
#include "libs/model/checkpoint.h"

namespace minke::cuda_model {

using cuda::DeviceBuffer;
using cuda::Stream;

// A rectangle of a matrix [rows, columns].
struct MatrixPart {
  int64_t row_begin = 0, rows = 0;
  int64_t column_begin = 0, columns = 0;
};

// Where weights come from: a checkpoint, another node (weight_transfer.h), or a benchmark's random numbers.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // Puts a part of a matrix of this shape, row after row, at `offset` bytes of `to`, in stream order.
  virtual absl::Status ReadPart(const std::string& name, std::span<const int64_t> shape,
                                const MatrixPart& part, DeviceBuffer& to, int64_t offset,
                                const Stream& stream) = 0;
  // The same for a whole matrix.
  absl::Status Read(const std::string& name, std::span<const int64_t> shape, DeviceBuffer& to, int64_t offset,
                    const Stream& stream) {
    return ReadPart(name, shape, {.rows = shape[0], .columns = shape[1]}, to, offset, stream);
  }
  // The same, widened to f32.
  virtual absl::Status ReadF32(const std::string& name, int64_t count, DeviceBuffer& to,
                               const Stream& stream) = 0;
  // Waits for everything that was read.
  virtual absl::Status Finish(const Stream& stream) { return stream.Synchronize(); }
};

// Through two halves of page-locked memory: one is copied to the device while the other is filled from the
// file.
class CheckpointSource final : public WeightSource {
 public:
  // The checkpoint must outlive the source.
  static absl::StatusOr<CheckpointSource> Create(const Checkpoint& checkpoint);
  absl::Status ReadPart(const std::string& name, std::span<const int64_t> shape, const MatrixPart& part,
                        DeviceBuffer& to, int64_t offset, const Stream& stream) override;
  absl::Status ReadF32(const std::string& name, int64_t count, DeviceBuffer& to,
                       const Stream& stream) override;

 private:
  explicit CheckpointSource(const Checkpoint& checkpoint) : checkpoint_(&checkpoint) {}
  // A half whose last copy is done.
  absl::StatusOr<std::byte*> Half();

  const Checkpoint* checkpoint_;
  cuda::PinnedBuffer staging_;
  std::vector<cuda::Event> copied_;  // of each half
  bool used_[2] = {false, false};
  int half_ = 0;
};

// INVALID_ARGUMENT naming the dimension, unless the GPU kernels can run this model, or its share of one of
// several ranks.
absl::Status CheckSupported(const ModelConfig& config, int64_t ranks = 1);

// Of a rank of several, heads and inner are its own.
struct LayerWeights {
  DeviceBuffer input_norm, post_norm, q_a_norm, kv_a_norm;  // f32
  DeviceBuffer qkv_a;    // [q_lora_rank or heads * qk, hidden] then [latent_dim, hidden]
  DeviceBuffer q_b;      // [heads * qk, q_lora_rank]; empty without q_lora_rank
  DeviceBuffer kv_b;     // [heads * (nope + v), kv_lora_rank]
  DeviceBuffer o;        // [hidden, heads * v]
  DeviceBuffer gate_up;  // [2 inner, hidden]: gate, then up, of the dense layer or the shared experts
  DeviceBuffer down;     // [hidden, inner]
  int64_t inner = 0;     // 0: neither
};

// What an attention node holds, or the share of one of its ranks: some of the heads and of the inner
// dimensions of dense layers and shared experts; everything else whole.
struct AttentionWeights {
  ModelConfig config;  // the model's, but num_attention_heads counts this share's
  kernels::Share share;
  DeviceBuffer embedding;   // [vocab, hidden]
  DeviceBuffer head;        // [vocab, hidden]; empty if it is the embedding
  DeviceBuffer final_norm;  // f32
  DeviceBuffer inv_freq;    // [rope / 2] f64
  double rope_magnitude = 1;
  std::vector<LayerWeights> layers;

  // Reads what weight_plan.h lists, in its order, after all of its memory was taken.
  static absl::StatusOr<AttentionWeights> Load(const ModelConfig& config, WeightSource& source,
                                               const Stream& stream,
                                               absl::FunctionRef<void(int32_t layer)> progress,
                                               kernels::Share share = {});
};

// mlp.gate.weight of one MoE layer: [experts, hidden].
absl::StatusOr<DeviceBuffer> LoadGate(const ModelConfig& config, int32_t layer, WeightSource& source,
                                      const Stream& stream);

// Routed experts of one layer. `staging` grows to one expert's bytes and may serve many calls on one stream.
absl::StatusOr<cuda::GroupedFfnWeights> LoadExperts(const ModelConfig& config, int32_t layer,
                                                    ExpertRange range, cuda::FfnFormat format,
                                                    WeightSource& source, DeviceBuffer& staging,
                                                    const Stream& stream);

}  // namespace minke::cuda_model
