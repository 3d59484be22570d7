// Of a build without CUDA.
#include "services/attention/layers/cuda_models.h"

namespace minke::attention {

namespace {

absl::Status Missing() { return absl::FailedPreconditionError("this build has no CUDA backend"); }

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaModel(std::shared_ptr<const Checkpoint>,
                                                              CudaModelOptions,
                                                              absl::FunctionRef<void(int32_t)>) {
  return Missing();
}

uint64_t WeightsChecksum(const ModelConfig&) { return 0; }
absl::StatusOr<std::string> NewWeightsGroup() { return Missing(); }

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaRanks(const std::shared_ptr<const Checkpoint>&,
                                                              MlaChoice, int, int,
                                                              absl::FunctionRef<void(int32_t)>) {
  return Missing();
}

}  // namespace minke::attention
