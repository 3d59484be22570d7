// Random checkpoints of any shape, for tests, demos and benchmarks: weights scaled so that activations stay
// near unit size and routing is not degenerate. The same seed and configuration give the same bytes on any
// machine.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "libs/model/checkpoint.h"

namespace minke {

struct MakeCheckpointOptions {
  std::string directory;    // created; must not hold a checkpoint already
  std::string config_json;  // text of a config.json
  uint64_t seed = 0;
  DType dtype = DType::kBF16;
  int64_t shard_bytes_max = int64_t{2} << 30;
  int threads = 2;
};

absl::Status MakeCheckpoint(const MakeCheckpointOptions& options);

}  // namespace minke
