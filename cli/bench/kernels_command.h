// minke bench kernels: every kernel beside the machine's ceilings.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace minke::cli::bench {

struct KernelsFlags {
  std::string filter;
  double min_time_s = 0.3;
  int threads = 0;   // 0: all cores
  std::string isa;   // empty: the best this CPU has
  std::string json;  // "-": standard output
};

void AddKernelsFlags(CLI::App& app, KernelsFlags& flags);
// REQUIRES: no kernel ran before, and no other thread runs. The table goes to `out`, or to stderr if the JSON
// does.
absl::Status RunKernels(const KernelsFlags& flags, std::ostream& out);

}  // namespace minke::cli::bench
