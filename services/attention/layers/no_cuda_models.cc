// Of a build without CUDA.
#include "services/attention/layers/cuda_models.h"

namespace minke::attention {

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaModel(std::shared_ptr<const Checkpoint>, MlaChoice,
                                                              bool, absl::FunctionRef<void(int32_t)>) {
  return absl::FailedPreconditionError("this build has no CUDA backend");
}

}  // namespace minke::attention
