// Experts on a GPU. A launch is one copy up (tables and distinct rows), one grouped FFN per unit that has
// rows, one copy down, all on one stream; units are loaded on another. Built with CUDA only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>

#include "libs/base/thread_pool.h"
#include "libs/cuda_model/weights.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/grouped_ffn.h"
#include "services/experts/compute/expert_backend.h"
#include "services/experts/compute/launch_plan.h"

namespace minke::experts {

class CudaBackend final : public ExpertBackend {
 public:
  // Takes all memory that launches need, so that none of them can run out of it. `pool` copies rows.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const Checkpoint& checkpoint,
                                                             ExpertsFormat format, ThreadPool& pool);

  absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(UnitId unit) override;
  absl::StatusOr<std::unique_ptr<UnitBuilder>> BuildUnit(UnitId unit) override;
  uint64_t UnitLayout(UnitId unit) const override;
  absl::Status Run(const Units& units, uint32_t layer, std::span<const wire::WorkView> views,
                   std::span<const GroupRow> rows, std::span<std::byte* const> outs,
                   std::span<uint8_t> finite) override;

 private:
  CudaBackend(const ModelConfig& config, cuda::FfnFormat format, ThreadPool& pool, cuda::Stream launches,
              cuda::Stream gives, cuda::Stream loads, cuda_model::CheckpointSource source);
  absl::Status AllocateWorkspace();
  // At most kOutputsMax rows.
  absl::Status RunChunk(const Units& units, uint32_t layer, std::span<const wire::WorkView> views,
                        std::span<const GroupRow> rows, std::span<std::byte* const> outs,
                        std::span<uint8_t> finite);

  const ModelConfig config_;
  const cuda::FfnFormat format_;

  // The engine's.
  ThreadPool& pool_;
  LaunchPlan plan_;
  cuda::Stream launches_, gives_;
  // By experts of a unit: where the model's groups differ, by one expert, there are two.
  std::map<int32_t, cuda::GroupedFfn> ffn_;
  cuda::PinnedBuffer host_up_, host_down_;  // laid out by launch_plan.h
  cuda::DeviceBuffer up_, down_;

  // The loader's.
  cuda::Stream loads_;
  cuda_model::CheckpointSource source_;
  cuda::DeviceBuffer staging_;  // one expert as the checkpoint has it
};

}  // namespace minke::experts
