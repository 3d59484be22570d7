#include "libs/base/cpus.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "absl/strings/numbers.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke {

absl::StatusOr<std::vector<int>> ParseCpus(const std::string& list) {
  const auto bad = [&] {
    return absl::InvalidArgumentError(
        StrCat("expected CPUs below ", CPU_SETSIZE, " such as 0-3,8, found '", list, "'"));
  };
  std::vector<int> cpus;
  for (size_t at = 0; at <= list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    const std::string item = list.substr(at, end - at);
    const size_t dash = item.find('-');
    int first = 0, last = 0;
    if (!absl::SimpleAtoi(item.substr(0, dash), &first)) return bad();
    last = first;
    if (dash != std::string::npos && !absl::SimpleAtoi(item.substr(dash + 1), &last)) return bad();
    if (first < 0 || last < first || last >= CPU_SETSIZE) return bad();
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    at = end + 1;
  }
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  return cpus;
}

absl::Status RunOnCpus(const std::string& list) {
  MK_ASSIGN_OR_RETURN(const std::vector<int> cpus, ParseCpus(list));
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  if (sched_setaffinity(0, sizeof set, &set) != 0) {
    return absl::InvalidArgumentError(StrCat("cannot run on CPUs ", list, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

int UsableCpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

std::vector<std::string> NumaNodes(const std::string& sysfs) {
  std::map<int, std::string> nodes;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(sysfs, error)) {
    const std::string name = entry.path().filename();
    int index = 0;
    if (name.rfind("node", 0) != 0 || !absl::SimpleAtoi(name.substr(4), &index)) continue;
    std::ifstream file(entry.path() / "cpulist");
    std::string list;
    if (std::getline(file, list) && ParseCpus(list).ok())
      nodes[index] = list;  // nodes of memory only have no CPUs
  }
  std::vector<std::string> lists;
  for (auto& [index, list] : nodes) lists.push_back(std::move(list));
  return lists;
}

}  // namespace minke
