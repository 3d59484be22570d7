#include "cli/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli {

absl::StatusOr<Child> Spawn(const std::string& name, const std::string& program,
                            std::vector<std::string> arguments, bool reports) {
  int report[2];
  if (::pipe2(report, O_CLOEXEC) != 0)
    return absl::ResourceExhaustedError(StrCat("pipe: ", std::strerror(errno)));
  arguments.insert(arguments.begin(), program);
  if (reports) arguments.push_back(StrCat("--report-fd=", report[1]));
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid < 0) return absl::ResourceExhaustedError(StrCat("fork: ", std::strerror(errno)));
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);  // the parent died before the line above
    ::setpgid(0, 0);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    if (reports) ::fcntl(report[1], F_SETFD, 0);
    ::execv(program.c_str(), argv.data());
    ::_exit(127);
  }
  ::close(report[1]);
  if (!reports) ::close(report[0]);
  return Child{name, pid, reports ? report[0] : -1};
}

absl::StatusOr<std::optional<Report>> TakeReport(Child& child) {
  while (child.report.empty() || child.report.back() != '\n') {
    pollfd fd{child.report_fd, POLLIN, 0};
    if (::poll(&fd, 1, 0) <= 0) return std::nullopt;
    char buffer[256];
    const ssize_t n = ::read(child.report_fd, buffer, sizeof buffer);
    if (n <= 0) return absl::UnavailableError(StrCat(child.name, " ended before it could serve"));
    child.report.append(buffer, n);
  }
  child.report.pop_back();
  ::close(child.report_fd);
  child.report_fd = -1;
  const size_t space = child.report.find(' ');
  if (space == std::string::npos) return Report{.address = child.report, .metrics = ""};
  return Report{.address = child.report.substr(0, space), .metrics = child.report.substr(space + 1)};
}

absl::StatusOr<Report> ReadReport(Child& child, absl::Duration timeout, int stop_fd) {
  const absl::Time limit = absl::Now() + timeout;
  while (true) {
    MK_ASSIGN_OR_RETURN(const std::optional<Report> report, TakeReport(child));
    if (report.has_value()) return *report;
    const int64_t left_ms = absl::ToInt64Milliseconds(limit - absl::Now());
    if (left_ms <= 0)
      return absl::DeadlineExceededError(
          StrCat(child.name, ": expected it to listen by now, found it silent"));
    pollfd fds[] = {{child.report_fd, POLLIN, 0}, {stop_fd, POLLIN, 0}};
    if (::poll(fds, 2, static_cast<int>(left_ms)) > 0 && fds[1].revents != 0)
      return absl::CancelledError("stopped");
  }
}

void StopAll(std::span<Child* const> children, absl::Duration grace) {
  for (const Child* child : children) {
    if (!child->ended) ::kill(child->pid, SIGINT);
  }
  const absl::Time limit = absl::Now() + grace;
  bool killed = false;
  while (true) {
    bool left = false;
    for (Child* child : children) {
      if (!child->ended && ::waitpid(child->pid, nullptr, WNOHANG) != 0) child->ended = true;
      left |= !child->ended;
    }
    if (!left) break;
    if (absl::Now() > limit && !killed) {
      for (const Child* child : children) {
        if (!child->ended) ::kill(child->pid, SIGKILL);  // also ends a stopped one
      }
      killed = true;
    }
    absl::SleepFor(absl::Milliseconds(10));
  }
  for (Child* child : children) {
    if (child->report_fd >= 0) ::close(child->report_fd);
    child->report_fd = -1;
  }
}

std::string ProgramDirectory() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

}  // namespace minke::cli
