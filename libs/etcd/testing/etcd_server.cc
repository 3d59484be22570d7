#include "libs/etcd/testing/etcd_server.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/etcd/client.h"
#include "libs/etcd/server_command.h"

namespace minke::etcd {
namespace {

template <typename T>
T OrAbort(absl::StatusOr<T> value) {
  if (!value.ok()) std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
  MK_CHECK(value.ok());
  return *std::move(value);
}

}  // namespace

EtcdServer::EtcdServer()
    : client_port_(OrAbort(FreePort())),
      peer_port_(OrAbort(FreePort())),
      directory_((std::filesystem::temp_directory_path() / "minke-etcd-XXXXXX").string()) {
  MK_CHECK(::mkdtemp(directory_.data()) != nullptr);
  Start();
}

EtcdServer::~EtcdServer() {
  if (pid_ > 0) Kill();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

std::string EtcdServer::address() const { return StrCat("127.0.0.1:", client_port_); }

void EtcdServer::Start() {
  std::vector<std::string> arguments = ServerArguments(directory_ + "/data", client_port_, peer_port_);
  arguments.insert(arguments.begin(), OrAbort(FindServer()));
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  MK_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    ::execv(argv.front(), argv.data());
    ::_exit(127);
  }
  Client client({.endpoints = {address()}});
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  for (auto got = client.Get("/"); !got.ok(); got = client.Get("/")) {
    if (absl::Now() > limit) OrAbort(std::move(got));
    absl::SleepFor(absl::Milliseconds(50));
  }
}

void EtcdServer::Kill() {
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void EtcdServer::Freeze() { ::kill(pid_, SIGSTOP); }
void EtcdServer::Thaw() { ::kill(pid_, SIGCONT); }

void EtcdServer::StartAgain(bool with_data) {
  MK_CHECK(pid_ < 0);
  if (!with_data) std::filesystem::remove_all(directory_ + "/data");
  Start();
}

}  // namespace minke::etcd
