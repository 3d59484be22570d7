// The weights an attention node holds (embedding, MLA, norms, dense layers, shared experts, head) and the
// parts of the forward pass it computes with them. The routed experts between are not its business.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/kernels/cpu/rope.h"
#include "libs/model/checkpoint.h"

namespace minke::attention {

// One row of a step: a token of a sequence at a position, and where its latents go.
struct StepRow {
  uint32_t token = 0;
  uint32_t page = 0;       // of the latent cache
  uint32_t page_slot = 0;  // 0 ... kPageTokens - 1
  int64_t position = 0;
};

// Rows that go through the layers together, and their memory. Reused from step to step.
struct Microbatch {
  std::vector<StepRow> rows;
  std::vector<kernels::MlaChunk> chunks;  // row_begin relative to this microbatch
  kernels::Scratch<float> x;              // [rows, hidden], the residual stream
  std::byte* normed = nullptr;            // [rows, hidden] Act: input of the feed-forward block under way
  kernels::Scratch<std::byte> memory;     // of `normed`, unless the caller had a place for it
  kernels::Scratch<float> angles;         // [rows, rope_dim]: cosines, sines
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

class AttentionModel {
 public:
  static absl::StatusOr<std::unique_ptr<AttentionModel>> Load(
      std::shared_ptr<const Checkpoint> checkpoint, Precision precision, ThreadPool& pool,
      absl::FunctionRef<void(int32_t layer)> progress);

  const ModelConfig& config() const { return checkpoint_->config(); }
  Precision precision() const { return precision_; }
  int64_t CacheBytesPerToken() const;  // of all layers

  // x = embedding of the rows' tokens; rotary angles of their positions.
  void Embed(Microbatch& batch);
  // x += MLA(norm(x)); then normed = post-attention norm of x. `cache`: this layer's pages, where the rows'
  // latents are written first. `normed`: where the result is wanted, such as in the message that carries it
  // to the experts; null: anywhere.
  void Attention(int32_t layer, Microbatch& batch, std::byte* cache, std::byte* normed);
  // x += FFN(normed): the dense layer's or the shared experts'. Nothing if the layer has neither.
  void FeedForward(int32_t layer, Microbatch& batch);
  // logits [selected, vocab] f32 of rows `selected` of the final x.
  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits);

 private:
  struct Layer {
    std::vector<float> input_norm, post_norm, q_a_norm, kv_a_norm;
    kernels::PackedMatrix qkv_a;  // [q_lora_rank or heads * qk, hidden] then [latent_dim, hidden]
    kernels::PackedMatrix q_b;    // empty without q_lora_rank
    kernels::MlaWeights mla;
    kernels::PackedMatrix o;
    kernels::FfnWeights ffn;  // dense or shared; empty if neither
    bool has_ffn = false;
  };

  AttentionModel(std::shared_ptr<const Checkpoint> checkpoint, Precision precision, ThreadPool& pool)
      : checkpoint_(std::move(checkpoint)),
        precision_(precision),
        pool_(pool),
        shape_(checkpoint_->config()),
        rope_(checkpoint_->config()) {}
  absl::Status LoadLayer(int32_t index);
  absl::StatusOr<std::vector<float>> LoadVector(const std::string& name, int64_t n) const;
  void ForRows(int64_t rows, absl::FunctionRef<void(int64_t)> body);
  void NormRow(const std::vector<float>& weight, const float* x, std::byte* out);

  const std::shared_ptr<const Checkpoint>
      checkpoint_;  // shared with the process's other roles; embedding is read in place
  const Precision precision_;
  ThreadPool& pool_;
  const kernels::MlaShape shape_;
  const kernels::Rope rope_;
  TensorView embedding_;
  std::vector<float> final_norm_;
  kernels::PackedMatrix head_;
  std::vector<Layer> layers_;

  // Scratch of one Attention call.
  kernels::Scratch<float> qkv_, q_, projected_;
  kernels::Scratch<std::byte> q_compressed_, heads_out_;
  kernels::MlaScratch mla_scratch_;
  kernels::FfnScratch ffn_scratch_;
  kernels::Scratch<std::byte> head_in_;
};

}  // namespace minke::attention
