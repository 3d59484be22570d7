// Which CPUs a process runs on. Memory is placed where the thread that first writes it runs, so a process
// kept on one NUMA node packs its weights into that node's memory.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minke {

// "0-3,8,10-11", as Linux writes lists of CPUs; ascending, without repetitions. INVALID_ARGUMENT otherwise,
// or if empty.
absl::StatusOr<std::vector<int>> ParseCpus(const std::string& list);

// Keeps this thread, and all it starts from now on, on these CPUs. INVALID_ARGUMENT if the machine has none
// of them.
absl::Status RunOnCpus(const std::string& list);

// How many CPUs this thread may run on; at least 1.
int UsableCpus();

// The CPU lists of the NUMA nodes that have CPUs, in order; fewer than two where there is nothing to choose.
std::vector<std::string> NumaNodes(const std::string& sysfs = "/sys/devices/system/node");

}  // namespace minke
