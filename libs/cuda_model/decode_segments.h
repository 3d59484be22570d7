// A decode step of an attention node, whose routed experts are elsewhere: what lies between two exchanges is
// one CUDA graph per bucket of rows. Of layer l:
//   Attention    (l = 0: inputs and embedding; after a MoE layer: its experts' sums to the device and into x)
//                attention, and the normed rows for the experts to page-locked memory
//                (or they stay where they are, and the sums are on the device already: Options::on_device)
//   FeedForward  the dense layer or the shared experts, while the rows are away
//   Logits       the last layer's sums, logits of all rows
// Thread-compatible. Design and numbers: docs/gpu_model.md.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/cuda_model/decode_inputs.h"
#include "libs/kernels/cuda/graph.h"

namespace minke::cuda_model {

class DecodeSegments {
 public:
  enum class Form : uint8_t { kGraph, kLaunches };  // the same work, for tests and measurements
  struct Options {
    std::vector<int32_t> buckets = kDecodeBuckets;
    int64_t context_max = 4096;  // tokens of a sequence
    bool on_device = false;  // `sums` is device memory, and the rows for the experts stay in batch.normed()
  };
  // The model, the batch and both page-locked arrays [rows_max of the model, hidden] are borrowed: `sums`,
  // which the experts' sums come from, and `normed`, where the rows for the experts go (null with on_device).
  // FAILED_PRECONDITION for a rank of several: NCCL's calls are launched.
  static absl::StatusOr<std::unique_ptr<DecodeSegments>> Create(AttentionOnGpu& attention, GpuBatch& batch,
                                                                const float* sums, bf16* normed,
                                                                const Options& options);

  int64_t rows_max() const { return inputs_.rows_max(); }

  // Begins a step. The last one's copies must be done: whoever has seen its logits, or its last normed rows,
  // may call this. A bucket's first step makes its graphs: about a millisecond a layer. Errors:
  // INVALID_ARGUMENT as DecodeInputs::BucketOf.
  absl::Status Begin(std::span<const DecodeInput> inputs, Form form = Form::kGraph);
  // In this order, for every layer. After Attention of a MoE layer and AttentionOnGpu::Synchronize, normed
  // has the rows; `sums` must be there when the next segment is called, and stay until it is done.
  absl::Status Attention(int32_t layer) { return Run(2 * layer); }
  absl::Status FeedForward(int32_t layer) { return Run(2 * layer + 1); }
  // Logits [rows, vocab] of all rows on the device, until the next call for any batch:
  // AttentionOnGpu::DownloadLogits.
  absl::Status Logits() { return Run(2 * attention_.config().num_hidden_layers); }

 private:
  DecodeSegments(AttentionOnGpu& attention, GpuBatch& batch, const float* sums, bf16* normed, bool on_device,
                 DecodeInputs inputs)
      : attention_(attention),
        batch_(batch),
        sums_(sums),
        normed_(normed),
        on_device_(on_device),
        inputs_(std::move(inputs)) {}
  absl::Status Write(std::span<const DecodeInput> inputs);
  absl::Status MakeGraphs();
  absl::Status Run(int32_t segment);
  absl::Status Launches(int32_t segment);

  AttentionOnGpu& attention_;
  GpuBatch& batch_;
  const float* const sums_;
  bf16* const normed_;
  const bool on_device_;
  DecodeInputs inputs_;
  std::map<int32_t, std::vector<cuda::Graph>> graphs_;  // by bucket: of each segment
  // Of the step under way.
  int32_t bucket_ = 0;
  Form form_ = Form::kGraph;
};

}  // namespace minke::cuda_model
