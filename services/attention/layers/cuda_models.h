// Models on a GPU: an attention node's part, or the whole of it. A build without CUDA has neither.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/collective/device_collective.h"
#include "libs/model/checkpoint.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

struct CudaModelOptions {
  MlaChoice mla = MlaChoice::kAuto;
  bool whole = false;                       // with gate and routed experts: AttentionModel::whole() is there
  bool fp8_experts = false;                 // of a whole model: docs/gpu_experts.md
  std::unique_ptr<DeviceCollective> group;  // whose rank this model is; null: alone
  // Asks a running node for its weights; returns the name of the group by which they come (the node's
  // AttentionModel::GiveWeights is its first rank). Empty: they are read from the checkpoint, and so they are
  // when this or the transfer fails.
  std::function<absl::StatusOr<std::string>()> ask_for_weights;
};

// bf16, on the calling thread's GPU. Weights are read by Load or Prepare. INVALID_ARGUMENT for a model or a
// form of MLA the kernels have not, or a dimension that cannot be shared out; FAILED_PRECONDITION without a
// device; RESOURCE_EXHAUSTED if the weights do not fit.
absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaModel(
    std::shared_ptr<const Checkpoint> checkpoint, CudaModelOptions options,
    absl::FunctionRef<void(int32_t layer)> progress);

// Of the weights that go from node to node: equal on both sides, or they cannot.
uint64_t WeightsChecksum(const ModelConfig& config);
// A name for a new group of giver and receiver. FAILED_PRECONDITION without NCCL.
absl::StatusOr<std::string> NewWeightsGroup();

// An attention node's part by several ranks, rank r on GPU r, which meet through NCCL. Errors: LoadCudaModel;
// FAILED_PRECONDITION with fewer GPUs than ranks, or without NCCL.
absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaRanks(
    const std::shared_ptr<const Checkpoint>& checkpoint, MlaChoice mla, int ranks, int threads,
    absl::FunctionRef<void(int32_t layer)> progress);

}  // namespace minke::attention
