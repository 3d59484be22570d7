// Child processes that never outlive their parent.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace minke::cli {

struct Child {
  std::string name;  // "expert 1"
  pid_t pid = -1;
  int report_fd = -1;  // read end; the child writes one line once it listens
  bool ended = false;
};

// Starts `program` with `arguments` and "--report-fd N". The child gets SIGKILL when this thread's process
// dies, however it dies, and signals of the terminal do not reach it directly. reports: false for a program
// that is not ours, which gets no such flag and whose report_fd is -1.
absl::StatusOr<Child> Spawn(const std::string& name, const std::string& program,
                            std::vector<std::string> arguments, bool reports = true);

// The line the child reports. UNAVAILABLE if it ends or says nothing before `timeout`, or `stop_fd` becomes
// readable.
absl::StatusOr<std::string> ReadReport(Child& child, absl::Duration timeout, int stop_fd);

// SIGINT to all (stop without draining), SIGKILL to those left after `grace`; reaps them.
void StopAll(std::vector<Child>& children, absl::Duration grace);

// Folder of the running program.
std::string ProgramDirectory();

}  // namespace minke::cli
