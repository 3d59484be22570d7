// Models on a GPU: an attention node's part, or the whole of it. A build without CUDA has neither.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/collective/device_collective.h"
#include "libs/model/checkpoint.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

// bf16, on the calling thread's GPU. `whole`: with gate and routed experts (AttentionModel::whole() is
// there). Weights are read by Load or Prepare. `group`: whose rank this model is; null: alone.
// INVALID_ARGUMENT for a model or a form of MLA the kernels have not, or a dimension that cannot be shared
// out; FAILED_PRECONDITION without a device; RESOURCE_EXHAUSTED if the weights do not fit.
absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaModel(
    std::shared_ptr<const Checkpoint> checkpoint, MlaChoice mla, bool whole,
    absl::FunctionRef<void(int32_t layer)> progress, std::unique_ptr<DeviceCollective> group = nullptr);

// An attention node's part by several ranks, rank r on GPU r, which meet through NCCL. Errors: LoadCudaModel;
// FAILED_PRECONDITION with fewer GPUs than ranks, or without NCCL.
absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaRanks(
    const std::shared_ptr<const Checkpoint>& checkpoint, MlaChoice mla, int ranks, int threads,
    absl::FunctionRef<void(int32_t layer)> progress);

}  // namespace minke::attention
