// Experts on a GPU. A launch is one copy up (tables and distinct rows), one grouped FFN per unit that has
// rows, one copy down, all on one stream; units are loaded on another. With row memory only tables and flags
// are copied: rows are read and sums written where messages have them, and the host's go through RowStage.
// Built with CUDA only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "libs/base/thread_pool.h"
#include "libs/cuda_model/weights.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/grouped_ffn.h"
#include "services/experts/compute/expert_backend.h"
#include "services/experts/compute/launch_plan.h"
#include "services/experts/compute/row_stage.h"

namespace minke::experts {

class CudaBackend final : public ExpertBackend {
 public:
  // Takes all memory that launches need, so that none of them can run out of it. `pool` copies rows. `rows`:
  // this GPU's, or null.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const Checkpoint& checkpoint,
                                                             ExpertsFormat format, ThreadPool& pool,
                                                             transport::RowMemory* rows);

  absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(UnitId unit) override;
  absl::StatusOr<std::unique_ptr<UnitBuilder>> BuildUnit(UnitId unit) override;
  uint64_t UnitLayout(UnitId unit) const override;
  absl::Status Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                   std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                   std::span<uint8_t> finite) override;

 private:
  CudaBackend(const ModelConfig& config, cuda::FfnFormat format, ThreadPool& pool, cuda::Stream launches,
              cuda::Stream gives, cuda::Stream loads, cuda_model::CheckpointSource source,
              transport::RowMemory* rows);
  absl::Status AllocateWorkspace();
  // At most kOutputsMax rows.
  absl::Status RunChunk(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                        std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                        std::span<uint8_t> finite);
  // Fills numbers_ and the targets' table; what is the host's is left to stage_.
  void PlaceRows(std::span<const LaunchJob> jobs, std::span<const SumTarget> outs, int32_t* targets);

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
  transport::RowMemory* const rows_;  // null: there is none, and no stage_
  std::optional<RowStage> stage_;
  std::vector<int32_t> numbers_;  // of the plan's rows in row memory

  // The loader's.
  cuda::Stream loads_;
  cuda_model::CheckpointSource source_;
  cuda::DeviceBuffer staging_;  // one expert as the checkpoint has it
};

}  // namespace minke::experts
