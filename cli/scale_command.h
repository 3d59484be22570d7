// `minke scale`: more or fewer processes of a cluster of `minke up`, while it serves.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace minke::cli {

struct ScaleFlags {
  std::string pool;  // experts | attention | routers
  int64_t count = 0;
  int port = 8000;  // the cluster's HTTP port
  bool wait = true;
  int deadline_s = 180;  // of the wait; longer than the 120 s in which a process drains
};

void AddScaleFlags(CLI::App& app, ScaleFlags& flags);
// Says on `out` what it did. DEADLINE_EXCEEDED: it was done, but is not over in time.
absl::Status RunScale(const ScaleFlags& flags, std::ostream& out);

}  // namespace minke::cli
