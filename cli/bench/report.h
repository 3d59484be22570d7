// The result of `minke bench serve`, for people and for programs. docs/benchmarking.md says what each number
// means.
#pragma once

#include <string>

#include "cli/bench/load.h"
#include "cli/bench/serve_flags.h"
#include "cli/bench/statistics.h"

namespace minke::cli::bench {

struct ServeReport {
  std::string version;
  ServeFlags flags;
  std::string model;
  RunStatistics statistics;
  LoadState state;
  bool interrupted = false;
  double cpu_user_s = 0, cpu_system_s = 0;  // of this tool, during the measured run
  int64_t connections_opened = 0;           // from the warm-up on
};

std::string FormatTable(const ServeReport& report);
// One JSON object and a newline. Fields are added to it, not renamed: "schema" would go up. A latency that
// was never measured is {"count": 0}.
std::string FormatJson(const ServeReport& report);

}  // namespace minke::cli::bench
