#include "libs/cuda_model/decode_segments.h"

#include "libs/base/status.h"

namespace minke::cuda_model {

absl::StatusOr<std::unique_ptr<DecodeSegments>> DecodeSegments::Create(AttentionOnGpu& attention,
                                                                       GpuBatch& batch, const float* sums,
                                                                       bf16* normed, const Options& options) {
  if (attention.weights().share.of > 1) {
    return absl::FailedPreconditionError("DecodeSegments: a rank of several is launched, not a graph");
  }
  const AttentionOnGpu::Options& limits = attention.options();
  MK_ASSIGN_OR_RETURN(DecodeInputs inputs,
                      DecodeInputs::Create({.buckets = options.buckets,
                                            .rows_max = std::min(limits.rows_max, limits.sequences_max),
                                            .context_max = options.context_max,
                                            .vocab = attention.config().vocab_size,
                                            .scratch_page = attention.scratch_page()}));
  return std::unique_ptr<DecodeSegments>(
      new DecodeSegments(attention, batch, sums, normed, options.on_device, std::move(inputs)));
}

absl::Status DecodeSegments::Launches(int32_t segment) {
  const ModelConfig& config = attention_.config();
  const int32_t layer = segment / 2;
  if (segment % 2 == 1) return attention_.FeedForward(layer, batch_);
  if (layer == 0) {
    MK_RETURN_IF_ERROR(inputs_.Upload(bucket_, attention_.stream()));
    MK_RETURN_IF_ERROR(attention_.Embed(batch_));
  } else if (config.IsMoeLayer(layer - 1)) {
    MK_RETURN_IF_ERROR(on_device_ ? attention_.AddDeviceSums(batch_, sums_)
                                  : attention_.AddSums(batch_, sums_));
  }
  if (layer == config.num_hidden_layers) return attention_.Logits(batch_, nullptr, bucket_).status();
  MK_RETURN_IF_ERROR(attention_.Attention(layer, batch_));
  if (on_device_ || !config.IsMoeLayer(layer)) return absl::OkStatus();
  return attention_.DownloadNormed(batch_, normed_);
}

absl::Status DecodeSegments::Run(int32_t segment) {
  return form_ == Form::kLaunches ? Launches(segment)
                                  : graphs_.at(bucket_)[segment].Launch(attention_.stream());
}

absl::Status DecodeSegments::Write(std::span<const DecodeInput> inputs) {
  inputs_.Write(inputs, bucket_);
  return attention_.BeginDecode(batch_, inputs_.View(bucket_), inputs_.sequences());
}

absl::Status DecodeSegments::MakeGraphs() {
  const int32_t segments = 2 * attention_.config().num_hidden_layers + 1;
  // Once without graphs, and with padding only, so that modules are loaded and algorithms chosen.
  MK_RETURN_IF_ERROR(Write({}));
  for (int32_t segment = 0; segment < segments; ++segment) MK_RETURN_IF_ERROR(Launches(segment));
  MK_RETURN_IF_ERROR(attention_.Synchronize());
  std::vector<cuda::Graph> graphs;
  for (int32_t segment = 0; segment < segments; ++segment) {
    MK_ASSIGN_OR_RETURN(cuda::Graph graph,
                        cuda::Graph::Capture(attention_.stream(), [&] { return Launches(segment); }));
    graphs.push_back(std::move(graph));
  }
  graphs_.emplace(bucket_, std::move(graphs));
  return absl::OkStatus();
}

absl::Status DecodeSegments::Begin(std::span<const DecodeInput> inputs, Form form) {
  MK_ASSIGN_OR_RETURN(bucket_, inputs_.BucketOf(inputs));
  form_ = form;
  if (form == Form::kGraph && !graphs_.contains(bucket_)) MK_RETURN_IF_ERROR(MakeGraphs());
  return Write(inputs);
}

}  // namespace minke::cuda_model
