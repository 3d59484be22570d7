// Ping-pong between two processes over UCX, and between two threads in process: round trips, adaptive
// polling.
//   transport_bench [auto|tcp] [interface]
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "libs/base/log.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/ucx/ucx.h"

namespace minke::transport {
namespace {

constexpr uint64_t kServerId = 1, kClientId = 2;

std::unique_ptr<Transport> MakeUcx(uint64_t id, const std::string& selection, const std::string& interface) {
  UcxOptions options;
  options.interface = interface;
  options.selection = ParseUcxSelection(selection).value();
  auto made = CreateUcx({.node_id = NodeId{id}}, options);
  if (!made.ok()) {
    std::fprintf(stderr, "%s\n", made.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(made);
}

// Sends every frame back until the peer is gone.
void Echo(Transport& transport, const std::atomic<bool>& stop) {
  bool lost = false;
  while (!lost && !stop) {
    transport.Wait(absl::Milliseconds(100));
    transport.Poll([&](Event& event) {
      if (event.kind == Event::Kind::kFrame) transport.Send(event.peer, std::move(event.frame)).IgnoreError();
      if (event.kind == Event::Kind::kPeerLost) lost = true;
    });
  }
}

void Measure(Transport& transport, const char* name, const std::string& address) {
  bool up = false, answered = false;
  const auto step = [&] {
    transport.Wait(absl::Seconds(1));
    transport.Poll([&](Event& event) {
      up |= event.kind == Event::Kind::kPeerUp;
      answered |= event.kind == Event::Kind::kFrame;
      if (event.kind == Event::Kind::kPeerLost) std::exit(1);
    });
  };
  transport.Connect(NodeId{kServerId}, address).IgnoreError();
  while (!up) step();
  for (uint32_t bytes : {64u, 10u * 1024, 80u * 1024, 256u * 1024}) {
    const int rounds = bytes > 100'000 ? 3000 : 20'000;
    std::vector<double> times_us;
    for (int i = -rounds / 10; i < rounds; ++i) {
      FrameRef frame = transport.frames().Allocate(bytes);
      frame.header().kind = wire::Kind::kPartial;
      std::memset(frame.payload(), i, std::min(bytes, 64u));
      answered = false;
      const auto begin = std::chrono::steady_clock::now();
      if (!transport.Send(NodeId{kServerId}, std::move(frame)).ok()) std::exit(1);
      while (!answered) step();
      const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
      if (i >= 0) times_us.push_back(time.count());
    }
    std::sort(times_us.begin(), times_us.end());
    std::printf("%-8s %-8s %8u B   round trip p50 %8.2f us   p99 %8.2f us\n", name,
                transport.statistics()[0].transport.c_str(), bytes, times_us[times_us.size() / 2],
                times_us[times_us.size() * 99 / 100]);
    std::fflush(stdout);
  }
}

void BetweenProcesses(const std::string& selection, const std::string& interface) {
  int address_pipe[2];
  if (pipe(address_pipe) != 0) std::exit(1);
  const pid_t child = fork();  // before any UCX context
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const auto transport = MakeUcx(kServerId, selection, interface);
    const std::string address = transport->address();
    if (write(address_pipe[1], address.data(), address.size()) < 0) std::exit(1);
    std::atomic<bool> stop{false};
    Echo(*transport, stop);
    std::_Exit(0);
  }
  char address[128] = "";
  if (read(address_pipe[0], address, sizeof(address) - 1) <= 0) std::exit(1);
  {
    const auto transport = MakeUcx(kClientId, selection, interface);
    Measure(*transport, "ucx", address);
  }
  waitpid(child, nullptr, 0);
}

void BetweenThreads() {
  InprocHub hub;
  const auto server = CreateInproc(hub, {.node_id = NodeId{kServerId}});
  const auto client = CreateInproc(hub, {.node_id = NodeId{kClientId}});
  std::atomic<bool> stop{false};
  std::thread echo([&] { Echo(*server, stop); });
  Measure(*client, "inproc", server->address());
  stop = true;
  echo.join();
}

}  // namespace
}  // namespace minke::transport

int main(int argc, char** argv) {
  minke::log::SetLevel(minke::log::Level::kError);
  minke::transport::BetweenProcesses(argc > 1 ? argv[1] : "auto", argc > 2 ? argv[2] : "lo");
  minke::transport::BetweenThreads();
  return 0;
}
