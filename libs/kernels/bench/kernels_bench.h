// Every kernel beside the ceilings of the machine, measured in the same run: `minke bench kernels`.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "libs/kernels/cpu/tile_kernels.h"

namespace minke::kernels::bench {

struct KernelsBenchOptions {
  std::string filter;        // extended regular expression, searched for in the names; empty: all
  double min_seconds = 0.3;  // of one kernel
  int threads = 1;
  Isa isa = Isa::kPortable;  // REQUIRES: Tiles() is TileKernelsFor(isa)
};

// The table goes to `table` line by line; `json`, if not nullptr, gets Google Benchmark's JSON at the end,
// with the ceilings in its context. INVALID_ARGUMENT: the filter is no regular expression, or no kernel
// matches it. Not thread-safe, as Google Benchmark is not.
absl::Status RunKernelsBench(const KernelsBenchOptions& options, std::ostream& table, std::ostream* json);

}  // namespace minke::kernels::bench
