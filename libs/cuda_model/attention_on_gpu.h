// The parts of the forward pass that an attention node computes, on a GPU: what services/attention/layers
// does on a CPU in bf16, segment by segment, with the latent cache in device memory. The routed experts
// between the segments are somebody else's: a cluster's (DownloadNormed, AddPartials), or WholeModel's.
//
// Weights and activations are bf16, the residual stream and the logits f32, every sum f32. Work goes to one
// stream in order; calls return before it is done. Several batches may be under way, a segment of one after a
// segment of another. Thread-compatible.
//
// Several ranks, each with a share of the weights on a GPU of its own, compute one model together: every rank
// makes the same calls, and x and the latent cache are the same on all. Design and numbers:
// docs/gpu_model.md.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/collective/device_collective.h"
#include "libs/cuda_model/gpu_batch.h"
#include "libs/cuda_model/weights.h"
#include "libs/kernels/cuda/linear.h"

namespace minke::cuda_model {

class AttentionOnGpu {
 public:
  struct Options {
    int64_t rows_max = 512;       // of a batch
    int64_t sequences_max = 512;  // chunks of a batch, and rows of Logits
    int64_t cache_pages = 0;      // of 64 tokens, in every layer
    // Keys expanded at once for the naive form. A chunk with more behind it takes the absorbed form instead.
    int64_t prefill_keys_max = 16384;
    cuda::Path path = cuda::Path::kAuto;
  };
  // `group`: among the ranks, whose share `weights` is; null: alone.
  static absl::StatusOr<std::unique_ptr<AttentionOnGpu>> Create(
      AttentionWeights weights, const Options& options, std::unique_ptr<DeviceCollective> group = nullptr);

  const ModelConfig& config() const { return weights_.config; }  // its heads: of this rank
  const AttentionWeights& weights() const { return weights_; }
  const Options& options() const { return options_; }
  const Stream& stream() const { return stream_; }
  // Waits for everything so far. DEADLINE_EXCEEDED if another rank does not come.
  absl::Status Synchronize() const { return group_ ? group_->Wait(stream_) : stream_.Synchronize(); }
  int64_t bytes_per_page() const;  // of all layers

  absl::StatusOr<std::unique_ptr<GpuBatch>> MakeBatch();

  // Whether a chunk takes the absorbed form. A batch's chunks that do come before those that do not.
  bool Absorbed(int64_t rows, int64_t position_begin) const;

  // Sets the batch's rows, chunk by chunk. INVALID_ARGUMENT for chunks in the wrong order, without a row,
  // without the pages they need, past the limits, or with a token outside the vocabulary.
  absl::Status Begin(GpuBatch& batch, std::span<const GpuChunk> chunks);
  // The same for rows whose tables the caller has put on the device: one row per sequence of these lengths.
  absl::Status BeginDecode(GpuBatch& batch, const BatchView& view,
                           std::span<const cuda::DecodeSequence> sequences);

  // x = embedding of the rows' tokens; rotary angles of their positions.
  absl::Status Embed(GpuBatch& batch);
  // x += pending + MLA(norm(x + pending)); then normed = post-attention norm of x. Writes the rows' latents
  // first.
  absl::Status Attention(int32_t layer, GpuBatch& batch);
  // x += FFN(normed): the dense layer's or the shared experts'. Nothing if the layer has neither. `stream`:
  // may be another one, if the caller orders the two; nothing else here may then touch x. (Of several ranks
  // it is the same one: their collective calls are in one order.)
  absl::Status FeedForward(int32_t layer, GpuBatch& batch, const Stream& stream);
  absl::Status FeedForward(int32_t layer, GpuBatch& batch) { return FeedForward(layer, batch, stream_); }
  // Logits [selected, vocab] f32, on the device until the next call, of rows `selected` (null: the first
  // `count` rows) of x + pending. `selected` is on the device.
  absl::StatusOr<const float*> Logits(GpuBatch& batch, const int32_t* selected, int64_t count);
  // The same for rows named on the host.
  absl::StatusOr<const float*> Logits(GpuBatch& batch, std::span<const int32_t> selected);

  // Rows [begin, begin + rows) of what Logits gave last, to host memory [rows, vocab]; waits.
  absl::Status DownloadLogits(int64_t begin, int64_t rows, float* logits) const;
  // The first rows of it.
  absl::StatusOr<std::vector<float>> DownloadLogits(int64_t rows) const;

  // For the exchange with expert servers. normed [rows, hidden] to the host; valid once the stream is
  // synchronised.
  absl::Status DownloadNormed(const GpuBatch& batch, bf16* host) const;
  // x[r] += partials[begin[r]] + ... + partials[begin[r + 1] - 1] in order. begin [rows + 1]; partials
  // [begin[rows], hidden], at most options().rows_max * fan_out_max rows. Ordinary memory may be reused on
  // return.
  absl::Status AddPartials(GpuBatch& batch, std::span<const int32_t> begin, const bf16* partials);
  absl::Status AddPartials(GpuBatch& batch, std::span<const int32_t> begin, const float* partials);
  // x += sums [rows, hidden], in page-locked memory that stays as it is until the stream has passed this. May
  // be captured into a graph, which then reads the memory as it is at its launch.
  absl::Status AddSums(GpuBatch& batch, const float* sums);

  // The same from device memory.
  absl::Status AddDeviceSums(GpuBatch& batch, const float* sums);

  // One page of one layer [64, latent_dim], from and to ordinary memory; both wait for the stream.
  absl::Status ReadPage(int32_t layer, uint32_t page, void* latents) const;
  absl::Status WritePage(int32_t layer, uint32_t page, const void* latents);

  bf16* cache(int32_t layer) const;  // [cache_pages + 1, 64, latent_dim]
  uint32_t scratch_page() const {
    return static_cast<uint32_t>(options_.cache_pages);
  }  // padding rows write here

 private:
  AttentionOnGpu(AttentionWeights weights, const Options& options, Stream stream,
                 std::unique_ptr<DeviceCollective> group)
      : weights_(std::move(weights)),
        options_(options),
        stream_(std::move(stream)),
        group_(std::move(group)) {}
  absl::Status Allocate();
  absl::Status CheckChunks(std::span<const GpuChunk> chunks, int64_t& rows) const;
  template <class T>
  absl::Status AddPartialsOf(GpuBatch& batch, std::span<const int32_t> begin, const T* partials);
  absl::Status Norm(const GpuBatch& batch, const DeviceBuffer& weight, bool add);
  // x += what all ranks' products give, `product` being this one's but for where and how it writes.
  absl::Status AddToResidual(cuda::Linear& linear, cuda::LinearArgs product, GpuBatch& batch,
                             const Stream& stream);
  absl::Status AbsorbedRows(int32_t layer, GpuBatch& batch, const bf16* q, int64_t q_row);
  absl::Status NaiveRows(int32_t layer, GpuBatch& batch, const bf16* q, int64_t q_row);

  const AttentionWeights weights_;
  const Options options_;
  const Stream stream_;
  const std::unique_ptr<DeviceCollective> group_;
  std::optional<cuda::Linear> linear_, ffn_linear_, logits_linear_;  // the second may run beside the first
  bool decode_fits_ = false, prefill_fits_ = false;                  // the fast kernels, of this model
  DeviceBuffer cache_;                                               // [layers, pages + 1, 64, latent]
  // Scratch of one call, for rows_max rows.
  DeviceBuffer qkv_, q_compressed_, q_, q_latent_, out_latent_, q_packed_, heads_out_;
  DeviceBuffer latents_, expanded_;  // for prefill_keys_max keys
  DeviceBuffer gate_up_, inner_;     // of FeedForward
  DeviceBuffer selected_, head_in_, logits_;
  DeviceBuffer partial_begin_, partials_;
  DeviceBuffer one_per_row_;  // 0, 1, 2 ... rows_max
};

}  // namespace minke::cuda_model
