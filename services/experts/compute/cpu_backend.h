// Experts on the CPU: rows gathered by expert, all products in one call over the pool, sums reduced per group
// row. Row memory, if there is one, is host memory too (tests), so where rows lie makes no difference here.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/model/checkpoint.h"
#include "services/experts/compute/expert_backend.h"

namespace minke::experts {

class CpuBackend final : public ExpertBackend {
 public:
  CpuBackend(const Checkpoint& checkpoint, Precision precision, ThreadPool& pool, ThreadPool& load_pool)
      : checkpoint_(checkpoint),
        config_(checkpoint.config()),
        precision_(precision),
        pool_(pool),
        load_pool_(load_pool) {}

  absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(UnitId unit) override;
  absl::StatusOr<std::unique_ptr<UnitBuilder>> BuildUnit(UnitId unit) override;
  uint64_t UnitLayout(UnitId unit) const override;
  absl::Status Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                   std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                   std::span<uint8_t> finite) override;

 private:
  struct Pair {
    uint16_t expert;
    uint32_t group_row;
    uint32_t position;  // row of the gathered input
  };
  const Checkpoint& checkpoint_;
  const ModelConfig config_;
  const Precision precision_;
  ThreadPool& pool_;
  ThreadPool& load_pool_;  // the loader's; the rest is the engine's
  std::vector<Pair> pairs_;
  std::vector<uint32_t> pair_begin_;   // of each group row, in order_
  std::vector<uint32_t> position_of_;  // gathered row of each (group row, pair)
  std::vector<kernels::FfnRows> items_;
  kernels::Scratch<std::byte> gathered_;  // [pairs, hidden] Act
  kernels::Scratch<float> outputs_;       // [pairs, hidden]
  kernels::FfnScratch scratch_;
};

}  // namespace minke::experts
