// The weights an attention node holds (embedding, MLA, norms, dense layers, shared experts, head), its latent
// cache, and the parts of the forward pass it computes with them, on a CPU or a GPU. The routed experts
// between are a cluster's (engine/), unless the model has them too (WholeSteps).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "libs/base/dtype.h"
#include "libs/gpu_rows/row_combiner.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/model/config.h"
#include "libs/transport/row_memory.h"
#include "services/attention/latent_cache/page_memory.h"
#include "services/attention/sampling/sampler.h"

namespace minke::attention {

// A row of a step: a token of a sequence at a position, and where its latents go.
struct StepRow {
  uint32_t token = 0;
  uint32_t page = 0;       // of the latent cache
  uint32_t page_slot = 0;  // 0 ... kPageTokens - 1
  int64_t position = 0;
};

// Rows that go through the layers together. Their memory is the model's, by `index`.
struct Microbatch {
  int index = 0;
  std::vector<StepRow> rows;
  std::vector<kernels::MlaChunk> chunks;  // row_begin relative to this microbatch; absorbed ones first
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// What the engine asks of a model beyond its weights.
struct ModelLimits {
  int64_t cache_pages = 0;
  int microbatches = 1;
  int64_t rows_max = 0;       // of a microbatch
  int64_t sequences_max = 0;  // chunks of a microbatch
  // Of the exchange. Not null: a model on the same device leaves its rows there (AttentionModel::on_device).
  transport::RowMemory* row_memory = nullptr;
  std::vector<uint8_t> allowed_tokens;  // [vocab] 0/1: ids that may be drawn; empty: all
};

// Which forms of MLA a chunk may take.
enum class MlaChoice { kAuto, kAbsorbed, kNaive };

// A row after which a token is wanted.
struct DrawRow {
  int32_t row = 0;                         // of the microbatch
  const SamplingParams* params = nullptr;  // null: only the row's logits
  int64_t position = 0;                    // of the new token in its sequence
};

// A model that has the routed experts too: steps need no exchange, and no copy to the host between layers.
class WholeSteps {
 public:
  static constexpr uint32_t kNoToken = 0xffffffff;
  virtual ~WholeSteps() = default;
  // Whether it can draw by these parameters itself; otherwise ask for the row's logits.
  virtual bool CanDraw(const SamplingParams& params) const = 0;
  // Computes all rows of the microbatch; tokens[i] becomes the token drawn after draws[i].row (rows ascend),
  // or kNoToken where there is none: parameters null, or a forward pass without numbers.
  // AttentionModel::Logits then gives the logits of any of the draws' rows.
  virtual void Step(const Microbatch& batch, std::span<const DrawRow> draws, std::span<uint32_t> tokens) = 0;
};

// The model's side of the exchange in the memory of its device: rows and sums do not cross host memory.
class RowsOnDevice {
 public:
  virtual ~RowsOnDevice() = default;
  // As AttentionModel::Attention. The norm [rows, hidden] Act, complete, and as it is until the microbatch's
  // next layer.
  virtual const std::byte* AttentionRows(int32_t layer, const Microbatch& batch) = 0;
  // [rows, hidden] f32: where the routed experts' sums go, ...
  virtual float* DeviceSums(const Microbatch& batch) = 0;
  // ... which then are in x.
  virtual void AddDeviceSums(const Microbatch& batch) = 0;
  // Adds partial sums up on the device: all that a microbatch can have.
  virtual RowCombiner& combiner() = 0;
};

// Engine thread only. A device that fails ends the process: its streams go on elsewhere.
class AttentionModel : public PageMemory {
 public:
  virtual const ModelConfig& config() const = 0;
  virtual Precision precision() const = 0;
  virtual int64_t CacheBytesPerToken() const = 0;  // of all layers
  // Allocates the latent cache and the microbatches' memory; once, before everything below.
  // RESOURCE_EXHAUSTED if the device has not enough.
  virtual absl::Status Prepare(const ModelLimits& limits) = 0;
  virtual int64_t cache_pages() const = 0;
  int32_t page_layers() const override { return config().num_hidden_layers; }
  int64_t page_layer_bytes() const override {
    return kernels::kPageTokens * config().latent_dim() * ActivationBytes(precision());
  }

  virtual kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const = 0;

  // x = embedding of the rows' tokens; rotary angles of their positions. Begins a step of the microbatch.
  virtual void Embed(const Microbatch& batch) = 0;
  // x += MLA(norm(x)); then the post-attention norm of x, input of the feed-forward blocks. The rows' latents
  // are written to the cache first. `rows`: where the norm is wanted in host memory too, [rows, hidden] Act,
  // such as in the message that carries it to the experts, valid until the exchange ends; null: nowhere.
  virtual void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) = 0;
  // x += FFN(norm): the dense layer's or the shared experts'. Nothing if the layer has neither.
  virtual void FeedForward(int32_t layer, const Microbatch& batch) = 0;
  // Host memory [rows, hidden] f32 to which the routed experts' sums are added, ...
  virtual float* RoutedTarget(const Microbatch& batch) = 0;
  // ... and then are in x.
  virtual void AddRouted(const Microbatch& batch) = 0;
  // logits [selected, vocab] f32 of rows `selected` of the final x.
  virtual void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) = 0;

  // Sends the weights to a new node's GPU as the first rank of the group (cuda_models.h); gives up when
  // `stop` is set. After Prepare, on any thread, beside everything else. UNIMPLEMENTED: this model cannot.
  virtual absl::Status GiveWeights(const std::string& group_id, const std::atomic<bool>& stop) {
    (void)group_id, (void)stop;
    return absl::UnimplementedError("this model's weights are not on one GPU");
  }

  // Null: rows for the experts, and their sums, are in host memory. Constant after Prepare.
  virtual RowsOnDevice* on_device() { return nullptr; }

  // Null: the routed experts are elsewhere.
  virtual WholeSteps* whole() { return nullptr; }
};

}  // namespace minke::attention
