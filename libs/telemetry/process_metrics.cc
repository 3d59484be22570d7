#include "libs/telemetry/process_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace minke::telemetry {
namespace {

double Seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

// Of this object file, which is part of the program: close enough to the process's own start.
const double kStartSeconds = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());

double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  double pages = 0, resident = 0;
  statm >> pages >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

void CollectProcess(std::string_view role, const std::string& node, Page& page) {
  page.Gauge("minke:build_info", "What runs here; the value is 1", 1,
             {{"version", MK_VERSION}, {"role", std::string(role)}, {"node", node}});
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  page.Counter("process_cpu_seconds_total", "CPU time of all threads",
               Seconds(usage.ru_utime) + Seconds(usage.ru_stime));
  page.Gauge("process_resident_memory_bytes", "Memory in RAM", ResidentBytes());
  page.Gauge("process_start_time_seconds", "Unix time of the process's start", kStartSeconds);
}

}  // namespace minke::telemetry
