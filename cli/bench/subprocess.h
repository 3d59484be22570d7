// Another program whose output is wanted, and which may hang.
#pragma once

#include <sys/types.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace minke::cli::bench {

using Variables = std::vector<std::pair<std::string, std::string>>;

// Path of a program on PATH; NOT_FOUND.
absl::StatusOr<std::string> FindProgram(const std::string& name);

// Last line of a program's output that is not empty, for messages; "nothing".
std::string LastLine(const std::string& text);

// Killed when destroyed, and when this process dies. Thread-compatible.
class Subprocess {
 public:
  // `arguments` without the program's name; `environment` is added to this process's own.
  static absl::StatusOr<Subprocess> Start(const std::string& path, const std::vector<std::string>& arguments,
                                          const Variables& environment);
  ~Subprocess();
  Subprocess(Subprocess&& other) noexcept;
  Subprocess& operator=(Subprocess&& other) = delete;

  bool Running();
  // Waits for its end; what it wrote to standard output and standard error. UNAVAILABLE, with the last line:
  // it failed. DEADLINE_EXCEEDED: it was still running and has been killed.
  absl::StatusOr<std::string> Finish(absl::Time deadline);

 private:
  Subprocess(std::string path, pid_t pid, int output) : path_(std::move(path)), pid_(pid), output_(output) {}

  std::string path_;
  pid_t pid_ = -1;  // -1: reaped, or moved from
  int output_ = -1;
  int wait_status_ = 0;
};

}  // namespace minke::cli::bench
