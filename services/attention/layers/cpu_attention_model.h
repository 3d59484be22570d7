// The CPU's model, in exact or bf16 precision: kernels of libs/kernels/cpu, weights packed at load. Alone, or
// one rank of several that share its heads and inner dimensions out (TensorParallelModel).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "libs/collective/collective.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/kernels/cpu/rope.h"
#include "libs/model/checkpoint.h"
#include "services/attention/latent_cache/page_pool.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

class CpuAttentionModel final : public AttentionModel {
 public:
  // `group`: whose rank this model is; null: alone. INVALID_ARGUMENT if a dimension cannot be shared out
  // evenly.
  static absl::StatusOr<std::unique_ptr<AttentionModel>> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                              Precision precision, MlaChoice mla,
                                                              ThreadPool& pool,
                                                              absl::FunctionRef<void(int32_t layer)> progress,
                                                              std::unique_ptr<Collective> group = nullptr);

  const ModelConfig& config() const override { return checkpoint_->config(); }
  Precision precision() const override { return precision_; }
  int64_t CacheBytesPerToken() const override;
  absl::Status Prepare(const ModelLimits& limits) override;
  int64_t cache_pages() const override { return cache_pages_; }
  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override;
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override;
  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override;
  void Embed(const Microbatch& batch) override;
  void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) override;
  void FeedForward(int32_t layer, const Microbatch& batch) override;
  float* RoutedTarget(const Microbatch& batch) override { return memory_[batch.index].x.data(); }
  void AddRouted(const Microbatch&) override {}
  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) override;

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
  // Of one microbatch, reused from step to step.
  struct BatchMemory {
    kernels::Scratch<float> x;          // [rows, hidden], the residual stream
    kernels::Scratch<std::byte> norm;   // [rows, hidden] Act
    kernels::Scratch<float> angles;     // [rows, rope_dim]: cosines, sines
    const std::byte* normed = nullptr;  // [rows, hidden] Act: input of the feed-forward block under way
  };

  CpuAttentionModel(std::shared_ptr<const Checkpoint> checkpoint, Precision precision, MlaChoice mla,
                    ThreadPool& pool, std::unique_ptr<Collective> group);
  // Adds up what the ranks computed of these rows.
  void AddRanks(float* values, int64_t count);
  absl::Status LoadLayer(int32_t index);
  absl::StatusOr<std::vector<float>> LoadVector(const std::string& name, int64_t n) const;
  void ForRows(int64_t rows, absl::FunctionRef<void(int64_t)> body);
  void NormRow(const std::vector<float>& weight, const float* x, std::byte* out);

  const std::shared_ptr<const Checkpoint>
      checkpoint_;  // shared with the process's other roles; embedding is read in place
  const Precision precision_;
  const MlaChoice mla_;
  ThreadPool& pool_;
  const std::unique_ptr<Collective> group_;
  const int64_t rank_, ranks_;
  const kernels::MlaShape shape_;  // of this rank's heads
  const kernels::Rope rope_;
  TensorView embedding_;
  std::vector<float> final_norm_;
  kernels::PackedMatrix head_;
  std::vector<Layer> layers_;
  int64_t cache_pages_ = 0;
  std::optional<LatentCache> cache_;
  std::vector<BatchMemory> memory_;  // by microbatch

  // Scratch of one Attention call.
  kernels::Scratch<float> qkv_, q_, projected_;
  kernels::Scratch<std::byte> q_compressed_, heads_out_;
  kernels::MlaScratch mla_scratch_;
  kernels::FfnScratch ffn_scratch_;
  kernels::Scratch<std::byte> head_in_;
};

}  // namespace minke::attention
