// Models of random weights in DeepSeek-V2's shapes, made on the device, and batches that decode with them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/model/config.h"

namespace minke::bench {

// Near unit size everywhere, as libs/model/make_checkpoint.h.
class RandomSource final : public cuda_model::WeightSource {
 public:
  absl::Status ReadPart(const std::string& name, std::span<const int64_t> shape,
                        const cuda_model::MatrixPart& part, cuda::DeviceBuffer& to, int64_t offset,
                        const cuda::Stream& stream) override;
  absl::Status ReadF32(const std::string& name, int64_t count, cuda::DeviceBuffer& to,
                       const cuda::Stream& stream) override;

 private:
  uint32_t seed_ = 0;
};

// V2's shape or V2-Lite's, with as many layers; the first is dense.
ModelConfig ShapeOf(bool v2, int layers);

absl::Status FillCache(cuda_model::AttentionOnGpu& attention);
// Every sequence's pages scattered, as after a while of serving.
std::vector<std::vector<uint32_t>> ScatteredPages(int batch, int64_t each);
// A batch of decoding rows at `context`, ready for Attention and FeedForward.
absl::StatusOr<std::unique_ptr<cuda_model::GpuBatch>> DecodingBatch(
    cuda_model::AttentionOnGpu& attention, int batch, int64_t context,
    const std::vector<std::vector<uint32_t>>& pages);

}  // namespace minke::bench
