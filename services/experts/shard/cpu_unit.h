// The weights of the (layer, group) units this server hosts. Units are loaded once and then immutable; the
// engine and the loader share them, so that one can be dropped while a launch still reads it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/ids.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/model/checkpoint.h"

namespace minke::experts {

// All routed experts of one group in one layer.
struct UnitWeights {
  ExpertRange range;                         // which experts
  std::vector<kernels::FfnWeights> experts;  // by expert - range.begin
  int64_t bytes() const;
};

// Reads and packs the unit's experts, touching only their bytes of the checkpoint.
absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(const Checkpoint& checkpoint, UnitId unit,
                                                            Precision precision, ThreadPool& pool);

}  // namespace minke::experts
