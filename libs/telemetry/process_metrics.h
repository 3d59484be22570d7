// What every process shows of itself.
#pragma once

#include <string>
#include <string_view>

#include "libs/telemetry/page.h"

namespace minke::telemetry {

// Version, role and node (as in logs; empty: none) of this process, CPU time, memory, start time: the last
// three under the names that Prometheus' own client libraries use.
void CollectProcess(std::string_view role, const std::string& node, Page& page);

}  // namespace minke::telemetry
