// Child processes that never outlive their parent.
#pragma once

#include <sys/types.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace minke::cli {

struct Child {
  std::string name;  // "expert 1"
  pid_t pid = -1;
  int report_fd = -1;  // read end; the child writes one line once it listens
  std::string report;  // what of the line has come
  bool ended = false;
};

// Starts `program` with `arguments` and "--report-fd N". The child gets SIGKILL when the calling thread ends,
// as with its process, however that dies (so a process that goes on starts children on its main thread only),
// and signals of the terminal do not reach it directly. reports: false for a program that is not ours, which
// gets no such flag and whose report_fd is -1.
absl::StatusOr<Child> Spawn(const std::string& name, const std::string& program,
                            std::vector<std::string> arguments, bool reports = true);

// The line a child reports once it listens (node::ReportAddress).
struct Report {
  std::string address;  // what the program is waited for: a router's gRPC address, a gateway's HTTP port
  std::string metrics;  // HOST:PORT of /metrics
};

// What the child reports, if it has by now; then its report_fd is closed. UNAVAILABLE if it ends without.
absl::StatusOr<std::optional<Report>> TakeReport(Child& child);

// The same, waiting. UNAVAILABLE if it ends, DEADLINE_EXCEEDED if it says nothing before `timeout`, CANCELLED
// if `stop_fd` becomes readable.
absl::StatusOr<Report> ReadReport(Child& child, absl::Duration timeout, int stop_fd);

// SIGINT to all (stop without draining), SIGKILL to those left after `grace`; reaps them.
void StopAll(std::span<Child* const> children, absl::Duration grace);

// Folder of the running program.
std::string ProgramDirectory();

}  // namespace minke::cli
