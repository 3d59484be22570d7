// A unit's weights in host memory, packed for the CPU's kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/model/checkpoint.h"
#include "services/experts/shard/unit.h"

namespace minke::experts {

struct CpuUnit final : UnitWeights {
  ExpertRange range;                         // which experts
  std::vector<kernels::FfnWeights> experts;  // by expert - range.begin
  int64_t bytes() const override;
  absl::Status Read(int64_t begin, std::span<std::byte> out) const override;
};

// Reads and packs the unit's experts, touching only their bytes of the checkpoint.
absl::StatusOr<std::shared_ptr<const CpuUnit>> LoadCpuUnit(const Checkpoint& checkpoint, UnitId unit,
                                                           Precision precision, ThreadPool& pool);

// Memory for the unit as LoadCpuUnit packs it.
std::unique_ptr<UnitBuilder> BuildCpuUnit(const ModelConfig& config, UnitId unit, Precision precision);

}  // namespace minke::experts
