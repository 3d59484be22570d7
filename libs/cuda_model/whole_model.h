// A whole DeepSeek-V2 on one GPU: AttentionOnGpu's segments, the gate and the routed experts on one stream,
// with no copy to the host between them, and sampling on the device. A decode step (one token for each of B
// sequences) is one CUDA graph per bucket of B; the rows that fill a bucket up go nowhere: they choose no
// experts, and write their latents to a page of their own. Prompts, and mixtures of prompts and decoding
// rows, are launched kernel by kernel. Design and numbers: docs/gpu_model.md.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/cuda_model/decode_inputs.h"
#include "libs/kernels/cuda/gate.h"
#include "libs/kernels/cuda/grouped_ffn.h"
#include "libs/kernels/cuda/sampling.h"

namespace minke::cuda_model {

// Thread-compatible; calls wait for their results.
class WholeModel {
 public:
  struct Options {
    AttentionOnGpu::Options attention;
    cuda::FfnFormat experts = cuda::FfnFormat::kBF16;
    int64_t context_max = 4096;                     // tokens of a sequence that decodes
    std::vector<int32_t> buckets = kDecodeBuckets;  // those up to rows_max are used
    std::vector<uint8_t> allowed;  // [vocab], 0: an id that is never sampled; empty: all may be
  };
  static absl::StatusOr<std::unique_ptr<WholeModel>> Create(const ModelConfig& config, WeightSource& source,
                                                            const Options& options,
                                                            absl::FunctionRef<void(int32_t layer)> progress);

  AttentionOnGpu& attention() { return *attention_; }

  // Puts the chunks' tokens through the model. Returns for each chunk the token after its last one, drawn by
  // sampling[i], or kNoToken where the forward pass gave no number. Errors: AttentionOnGpu::Begin.
  absl::StatusOr<std::vector<uint32_t>> Step(std::span<const GpuChunk> chunks,
                                             std::span<const cuda::SampleRow> sampling);

  enum class Form : uint8_t { kGraph, kLaunches };  // the same work, for tests and measurements
  // One token each; the same results as Step with chunks of one token. The result is valid until the next
  // call. INVALID_ARGUMENT for more rows than the largest bucket, or past context_max.
  absl::StatusOr<std::span<const uint32_t>> Decode(std::span<const DecodeInput> inputs,
                                                   Form form = Form::kGraph);

  // Logits of the last call, one row per chunk or input: attention().DownloadLogits.

  // The gate and the routed experts of every MoE layer, one after the other, on the rows' normed input.
  absl::Status RoutedExpertsForBench(GpuBatch& batch);

  // For parity tests: sees every MoE layer's choices [rows, k] in Step, after waiting for them.
  using Observer = std::function<void(int32_t layer, std::span<const int32_t> experts)>;
  void SetObserverForTest(Observer observer) { observer_ = std::move(observer); }

 private:
  struct MoeLayer {
    DeviceBuffer gate;
    cuda::GroupedFfnWeights experts;
  };

  WholeModel() = default;
  absl::Status Allocate(const ModelConfig& config, const Options& options);
  absl::Status Layers(GpuBatch& batch);
  absl::Status RoutedExperts(int32_t layer, GpuBatch& batch);
  absl::Status MixtureOfExperts(int32_t layer, GpuBatch& batch);
  absl::Status Sample(const float* logits, const cuda::SampleRow* params, int64_t rows);
  absl::Status DecodeLaunches(int32_t bucket);

  Options options_;
  std::unique_ptr<AttentionOnGpu> attention_;
  std::unique_ptr<GpuBatch> batch_;
  std::map<int32_t, MoeLayer> moe_;
  std::optional<cuda::Gate> gate_;
  std::optional<cuda::GroupedFfn> ffn_;
  std::optional<Stream> side_;  // the shared experts run beside the routed ones
  std::optional<cuda::Event> fork_, join_;
  DeviceBuffer experts_, weights_, status_;  // the gate's, of one layer
  DeviceBuffer partial_;                     // [rows, hidden] bf16
  DeviceBuffer allowed_, sampling_, tokens_;
  cuda::PinnedBuffer tokens_host_;
  std::optional<DecodeInputs> inputs_;
  std::map<int32_t, cuda::Graph> graphs_;  // by bucket
  Observer observer_;
};

}  // namespace minke::cuda_model
