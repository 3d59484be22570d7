#include "cli/bench/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "absl/time/clock.h"
#include "libs/base/strings.h"

namespace minke::cli::bench {
namespace {

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

std::string LastLine(const std::string& text) {
  std::istringstream lines(text);
  std::string line, last = "nothing";
  while (std::getline(lines, line)) {
    if (!line.empty()) last = line;
  }
  return last;
}

absl::StatusOr<std::string> FindProgram(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  std::string folder;
  while (std::getline(folders, folder, ':')) {
    std::string candidate = StrCat(folder.empty() ? "." : folder, "/", name);
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return absl::NotFoundError(StrCat(name, " is not on PATH"));
}

absl::StatusOr<Subprocess> Subprocess::Start(const std::string& path,
                                             const std::vector<std::string>& arguments,
                                             const Variables& environment) {
  int output[2];
  if (::pipe2(output, O_CLOEXEC) != 0)
    return absl::ResourceExhaustedError(StrCat("pipe: ", std::strerror(errno)));
  // All memory before the fork: other threads may hold the allocator's locks in it.
  std::vector<std::string> argument_strings = arguments, variables;
  argument_strings.insert(argument_strings.begin(), path);
  for (char** variable = environ; *variable != nullptr; ++variable) variables.emplace_back(*variable);
  for (const auto& [name, value] : environment) variables.push_back(StrCat(name, "=", value));
  const std::vector<char*> argv = Pointers(argument_strings), envp = Pointers(variables);
  const pid_t parent = ::getpid(), pid = ::fork();
  if (pid < 0) {
    ::close(output[0]);
    ::close(output[1]);
    return absl::ResourceExhaustedError(StrCat("fork: ", std::strerror(errno)));
  }
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);  // the parent died before the line above
    ::dup2(output[1], STDOUT_FILENO);
    ::dup2(output[1], STDERR_FILENO);
    ::execve(path.c_str(), argv.data(), envp.data());
    ::_exit(127);
  }
  ::close(output[1]);
  return Subprocess(path, pid, output[0]);
}

Subprocess::Subprocess(Subprocess&& other) noexcept
    : path_(std::move(other.path_)),
      pid_(std::exchange(other.pid_, -1)),
      output_(std::exchange(other.output_, -1)),
      wait_status_(other.wait_status_) {}

Subprocess::~Subprocess() {
  if (output_ >= 0) ::close(output_);
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

bool Subprocess::Running() {
  if (pid_ >= 0 && ::waitpid(pid_, &wait_status_, WNOHANG) == pid_) pid_ = -1;
  return pid_ >= 0;
}

absl::StatusOr<std::string> Subprocess::Finish(absl::Time deadline) {
  std::string text;
  while (true) {  // to the end of its output, and then to its own
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left_ms <= 0) return absl::DeadlineExceededError(StrCat(path_, " did not end in time"));
    if (output_ < 0) {
      if (!Running()) break;
      absl::SleepFor(absl::Milliseconds(1));
      continue;
    }
    pollfd readable{output_, POLLIN, 0};
    if (::poll(&readable, 1, static_cast<int>(std::min<int64_t>(left_ms, 1000))) <= 0) continue;
    char buffer[4096];
    const ssize_t n = ::read(output_, buffer, sizeof buffer);
    if (n > 0) {
      text.append(buffer, n);
    } else if (n == 0 || errno != EINTR) {
      ::close(output_);
      output_ = -1;
    }
  }
  if (!WIFEXITED(wait_status_) || WEXITSTATUS(wait_status_) != 0)
    return absl::UnavailableError(StrCat(path_, " failed: ", LastLine(text)));
  return text;
}

}  // namespace minke::cli::bench
