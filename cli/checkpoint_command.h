// `minke checkpoint inspect` and `minke checkpoint make`.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "absl/status/status.h"

namespace minke::cli {

// Prints shapes, sizes per role and what is missing. INVALID_ARGUMENT, after printing, if anything is.
absl::Status InspectCheckpoint(const std::string& directory, std::ostream& out);

struct MakeCheckpointFlags {
  std::string directory;
  std::string config_file;
  uint64_t seed = 0;
  std::string dtype = "bf16";  // bf16 | f32
  int64_t shard_mib = 2048;
  int threads = 0;         // 0: all cores
  bool tokenizer = false;  // also a byte-level tokenizer.json
};
absl::Status MakeCheckpointFromFlags(const MakeCheckpointFlags& flags, std::ostream& out);

}  // namespace minke::cli
