// What only UCX between processes can show: death, freezing, and input that is not ours.
#include "libs/transport/ucx/ucx.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/time/clock.h"
#include "libs/transport/testing/host_row_memory.h"
#include "libs/transport/ucx/addresses.h"
#include "libs/transport/ucx/ucx_settings.h"

namespace minke::transport {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kRowBytes = 1024;
constexpr int32_t kBlockRows = 250;
constexpr char kEchoArgument[] = "--echo-peer";

Identity MakeIdentity(uint64_t id) {
  return {.node_id = NodeId{id}, .model_fingerprint = 5, .cluster_secret = "s"};
}

std::unique_ptr<Transport> Make(uint64_t id, UcxOptions options = {}) {
  auto made = CreateUcx(MakeIdentity(id), options);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *std::move(made) : nullptr;
}

// The other process: echoes every frame until standard input ends.
int EchoPeer(uint64_t id, const std::string& selection, int heartbeat_ms) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  UcxOptions options;
  options.selection = ParseUcxSelection(selection).value();
  options.transport.heartbeat = absl::Milliseconds(heartbeat_ms);
  HostRowMemory rows(kRowBytes, kBlockRows, 8);
  options.transport.rows = &rows;
  auto made = CreateUcx(MakeIdentity(id), options);
  if (!made.ok()) return 1;
  Transport& transport = **made;
  std::printf("%s\n", transport.address().c_str());
  std::fflush(stdout);
  std::atomic<bool> stop{false};
  std::thread watcher([&] {
    char byte;
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    stop = true;
    transport.Wake();
  });
  while (!stop) {
    transport.Wait(absl::Seconds(10));
    transport.Poll([&](Event& event) {
      if (event.kind == Event::Kind::kFrame) transport.Send(event.peer, std::move(event.frame)).IgnoreError();
    });
  }
  watcher.join();
  return 0;
}

// This program, executed anew as an echo peer: UCX does not survive a fork.
class EchoProcess {
 public:
  EchoProcess(uint64_t id, const std::string& selection, int heartbeat_ms) {
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    const std::string id_text = std::to_string(id), heartbeat_text = std::to_string(heartbeat_ms);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      execl("/proc/self/exe", "ucx_test", kEchoArgument, id_text.c_str(), selection.c_str(),
            heartbeat_text.c_str(), nullptr);
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    stdin_ = in[1];
    std::string line;
    char byte;
    while (read(out[0], &byte, 1) == 1 && byte != '\n') line += byte;
    close(out[0]);
    address = line;
  }
  ~EchoProcess() {
    close(stdin_);
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  void Signal(int signal) { kill(pid_, signal); }

  std::string address;

 private:
  pid_t pid_ = -1;
  int stdin_ = -1;
};

struct Log {
  int up = 0, frames = 0;
  std::vector<absl::Status> lost;
};

bool WaitFor(Transport& transport, Log& log, const std::function<bool()>& done,
             absl::Duration limit = absl::Seconds(20)) {
  const absl::Time deadline = absl::Now() + limit;
  while (!done()) {
    if (absl::Now() > deadline) return false;
    transport.Wait(absl::Milliseconds(10));
    transport.Poll([&](Event& event) {
      switch (event.kind) {
        case Event::Kind::kFrame:
          ++log.frames;
          break;
        case Event::Kind::kPeerUp:
          ++log.up;
          break;
        case Event::Kind::kPeerLost:
          log.lost.push_back(event.reason);
          break;
      }
    });
  }
  return true;
}

FrameRef MakeFrame(Transport& transport, uint32_t bytes) {
  FrameRef frame = transport.frames().Allocate(bytes);
  frame.header().kind = wire::Kind::kPartial;
  std::memset(frame.payload(), 7, bytes);
  return frame;
}

class UcxProcessTest : public ::testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Transport> MakeHere(TransportOptions options) {
    UcxOptions ucx;
    ucx.transport = options;
    ucx.selection = ParseUcxSelection(GetParam()).value();
    return Make(1, ucx);
  }
};
INSTANTIATE_TEST_SUITE_P(All, UcxProcessTest, ::testing::Values("auto", "tcp"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(UcxProcessTest, KilledPeerSurfacesAtOnce) {
  EchoProcess peer(2, GetParam(), 250);
  const auto transport = MakeHere({});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  ASSERT_TRUE(transport->Send(NodeId{2}, MakeFrame(*transport, 10000)).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.frames == 1; }));
  const absl::Time killed = absl::Now();
  peer.Signal(SIGKILL);
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return !log.lost.empty(); }));
  const absl::Duration took = absl::Now() - killed;
  std::printf("killed peer found after %.1f ms: %s\n", absl::ToDoubleMilliseconds(took),
              log.lost[0].ToString().c_str());
  EXPECT_LT(took, absl::Seconds(1));
  EXPECT_EQ(log.lost[0].code(), absl::StatusCode::kUnavailable);
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return transport->frames().frames_in_use() == 0; }));
}

TEST_P(UcxProcessTest, PeerKilledInTheMiddleOfTrafficLeavesNoFrameBehind) {
  EchoProcess peer(2, GetParam(), 250);
  const auto transport = MakeHere({});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  bool killed = false;
  for (int i = 0; log.lost.empty() && i < 200000; ++i) {
    transport->Send(NodeId{2}, MakeFrame(*transport, 20000 + i % 7 * 30000)).IgnoreError();
    if (i % 4 == 0) WaitFor(*transport, log, [&, n = 0]() mutable { return n++ > 0; });
    if (log.frames > 50 && !std::exchange(killed, true)) peer.Signal(SIGKILL);
  }
  ASSERT_TRUE(killed);
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return !log.lost.empty(); }));
  EXPECT_TRUE(WaitFor(*transport, log, [&] { return transport->frames().frames_in_use() == 0; }));
}

// Messages of rows go by rendezvous: either side may be gone in the middle of it.
TEST_P(UcxProcessTest, PeerKilledInTheMiddleOfRowsLeavesNoBlockBehind) {
  constexpr int kBlocks = 32;
  HostRowMemory rows(kRowBytes, kBlockRows, kBlocks);
  EchoProcess peer(2, GetParam(), 250);
  const auto transport = MakeHere({.rows = &rows});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  bool killed = false;
  while (log.lost.empty() && absl::Now() < deadline) {
    constexpr uint32_t kRows = 100, kOffset = 832;  // 100 descriptors of 8 bytes, padded
    FrameRef frame = transport->frames().AllocateWithRows(kOffset + kRows * kRowBytes, kOffset, rows);
    if (frame) {
      frame.header().kind = wire::Kind::kPartial;
      frame.header().rows = kRows;
      std::memset(frame.payload(), 0, kOffset);
      std::memset(frame.device_rows(), 7, kRows * kRowBytes);
      transport->Send(NodeId{2}, std::move(frame)).IgnoreError();
    }
    WaitFor(*transport, log, [n = 0]() mutable { return n++ > 0; });
    if (log.frames > 50 && !std::exchange(killed, true)) {
      EXPECT_GT(transport->statistics()[0].frames_in_row_memory, 0u);
      peer.Signal(SIGKILL);
    }
  }
  ASSERT_TRUE(killed);
  ASSERT_FALSE(log.lost.empty());
  EXPECT_TRUE(WaitFor(*transport, log, [&] {
    return rows.blocks_free() == kBlocks && transport->frames().frames_in_use() == 0;
  }));
}

// One row in row memory, on its way to the peer.
absl::Status SendARow(Transport& transport, RowMemory& rows) {
  FrameRef frame = transport.frames().AllocateWithRows(64 + kRowBytes, 64, rows);
  if (!frame) return absl::ResourceExhaustedError("no free block");
  frame.header().kind = wire::Kind::kPartial;
  frame.header().rows = 1;
  std::memset(frame.payload(), 0, 64);
  std::memset(frame.device_rows(), 7, kRowBytes);
  return transport.Send(NodeId{2}, std::move(frame));
}

// A node with row memory that stood still for longer than its peers wait does not trust what lies in its
// queues: their blocks may hold other rows by now. Here the peer would wait two minutes, so the end comes
// from the thawed one.
TEST_P(UcxProcessTest, AThawedNodeWithRowMemoryGivesItsPeersUp) {
  constexpr int kHeartbeatMs = 100;
  HostRowMemory rows(kRowBytes, kBlockRows, 32);
  EchoProcess peer(2, GetParam(), kHeartbeatMs);
  const auto transport = MakeHere({.heartbeat = absl::Seconds(60), .rows = &rows});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  peer.Signal(SIGSTOP);
  absl::SleepFor(absl::Milliseconds(10 * kHeartbeatMs));
  EXPECT_TRUE(log.lost.empty());
  ASSERT_TRUE(SendARow(*transport, rows).ok());
  peer.Signal(SIGCONT);
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return !log.lost.empty(); }));
  EXPECT_EQ(log.frames, 0) << "echoed";
}

// The other side of the same: rows offered to a peer that was given up are left alone for a while, should it
// live.
TEST_P(UcxProcessTest, RowsOfALostPeerAreNotReusedAtOnce) {
  constexpr int kHeartbeatMs = 100, kBlocks = 32;
  HostRowMemory rows(kRowBytes, kBlockRows, kBlocks);
  EchoProcess peer(2, GetParam(), kHeartbeatMs);
  const auto transport = MakeHere({.heartbeat = absl::Milliseconds(kHeartbeatMs), .rows = &rows});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  peer.Signal(SIGSTOP);
  ASSERT_TRUE(SendARow(*transport, rows).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return !log.lost.empty(); }));
  const absl::Time lost = absl::Now();
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return rows.blocks_free() == kBlocks; }));
  EXPECT_GT(absl::Now() - lost, absl::Seconds(1));
}

TEST_P(UcxProcessTest, FrozenPeerIsFoundByHeartbeats) {
  constexpr int kHeartbeatMs = 100;
  EchoProcess peer(2, GetParam(), kHeartbeatMs);
  const auto transport = MakeHere({.heartbeat = absl::Milliseconds(kHeartbeatMs)});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  // Ten periods of nothing but heartbeats first.
  ASSERT_FALSE(WaitFor(
      *transport, log, [&] { return !log.lost.empty(); }, absl::Milliseconds(10 * kHeartbeatMs)));
  const absl::Time frozen = absl::Now();
  peer.Signal(SIGSTOP);
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return !log.lost.empty(); }));
  const absl::Duration took = absl::Now() - frozen;
  std::printf("frozen peer found after %.1f ms\n", absl::ToDoubleMilliseconds(took));
  EXPECT_GE(took, absl::Milliseconds(kHeartbeatMs));
  EXPECT_LT(took, absl::Seconds(2));
  EXPECT_EQ(log.lost[0].code(), absl::StatusCode::kDeadlineExceeded) << log.lost[0];
  // Thawed, it finds its connection closed and can be connected anew.
  peer.Signal(SIGCONT);
  for (int attempt = 0; log.up < 2 && attempt < 20; ++attempt) {
    const size_t lost = log.lost.size();
    ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
    ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 2 || log.lost.size() > lost; }));
  }
  EXPECT_EQ(log.up, 2);
}

TEST_P(UcxProcessTest, SendsToAFrozenPeerAreBoundedAndHaveADeadline) {
  EchoProcess peer(2, GetParam(), 60000);
  const auto transport = MakeHere(
      {.heartbeat = absl::Seconds(60), .send_timeout = absl::Milliseconds(300), .sends_per_peer_max = 50});
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
  peer.Signal(SIGSTOP);
  absl::Status status;
  for (int i = 0; i < 5000 && status.ok(); ++i)
    status = transport->Send(NodeId{2}, MakeFrame(*transport, 200000));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  ASSERT_TRUE(WaitFor(
      *transport, log, [&] { return !log.lost.empty(); }, absl::Seconds(60)));
  EXPECT_EQ(log.lost[0].code(), absl::StatusCode::kDeadlineExceeded) << log.lost[0];
  EXPECT_TRUE(WaitFor(*transport, log, [&] { return transport->frames().frames_in_use() == 0; }));
}

// ---- Input that is not ours
// -----------------------------------------------------------------------------------

// Of bytes that are not UCX's, the listener of UCX 1.13 takes: none, or a beginning that is no whole header
// of its own. On more it may abort the process, before any code of ours sees them (docs/wire_format.md,
// "Trust").
TEST(UcxListener, BrokenConnectionAttemptsAreNeitherACrashNorAPeer) {
  const auto transport = Make(1);
  Log log;
  const auto address = internal::ResolveHostPort(transport->address());
  ASSERT_TRUE(address.ok());
  std::mt19937 random(1);
  const auto look = [&] { WaitFor(*transport, log, [n = 0]() mutable { return n++ > 1; }); };
  for (int round = 0; round < 40; ++round) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ASSERT_EQ(connect(fd, address->get(), address->bytes), 0);
    unsigned char bytes[15];
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
    const size_t count = random() % (sizeof(bytes) + 1);
    ASSERT_EQ(write(fd, bytes, count), static_cast<ssize_t>(count));
    if (round % 2 == 0) look();
    close(fd);
    look();
  }
  EXPECT_EQ(log.up, 0);
  EchoProcess peer(2, "auto", 250);
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  EXPECT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));
}

// A UCX program that connects and sends one active message of its own making.
class Stranger {
 public:
  explicit Stranger(const std::string& address) {
    ucp_config_t* config = nullptr;
    EXPECT_EQ(ucp_config_read(nullptr, nullptr, &config), UCS_OK);
    EXPECT_EQ(ucp_config_modify(config, "TLS", "tcp,self"), UCS_OK);
    EXPECT_EQ(ucp_config_modify(config, "NET_DEVICES", "lo"), UCS_OK);
    ucp_params_t parameters{};
    parameters.field_mask = UCP_PARAM_FIELD_FEATURES;
    parameters.features = UCP_FEATURE_AM;
    EXPECT_EQ(ucp_init(&parameters, config, &context_), UCS_OK);
    ucp_config_release(config);
    ucp_worker_params_t worker_parameters{};
    EXPECT_EQ(ucp_worker_create(context_, &worker_parameters, &worker_), UCS_OK);
    const auto resolved = internal::ResolveHostPort(address);
    ucp_ep_params_t ep{};
    ep.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                    UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    ep.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    ep.sockaddr = {resolved->get(), resolved->bytes};
    ep.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    ep.err_handler = {[](void* arg, ucp_ep_h, ucs_status_t) { *static_cast<bool*>(arg) = true; }, &failed};
    EXPECT_EQ(ucp_ep_create(worker_, &ep, &ep_), UCS_OK);
  }
  ~Stranger() {
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
    void* request = ucp_ep_close_nbx(ep_, &parameters);
    if (UCS_PTR_IS_PTR(request)) {
      while (ucp_request_check_status(request) == UCS_INPROGRESS) ucp_worker_progress(worker_);
      ucp_request_free(request);
    }
    for (void* pending : requests_) ucp_request_free(pending);
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
  }
  void Send(const void* header, size_t header_bytes, size_t payload_bytes, uint32_t flags) {
    payload_.assign(payload_bytes, 0);
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    parameters.flags = flags;
    void* request =
        ucp_am_send_nbx(ep_, 1, header, header_bytes, payload_.data(), payload_bytes, &parameters);
    if (UCS_PTR_IS_PTR(request)) requests_.push_back(request);
  }
  void Progress() { ucp_worker_progress(worker_); }

  bool failed = false;

 private:
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h ep_ = nullptr;
  std::vector<char> payload_;
  std::vector<void*> requests_;
};

TEST(UcxListener, MalformedMessagesAreCountedAndTheirEndpointClosed) {
  EchoProcess peer(2, "auto", 250);
  const auto transport = Make(1);
  Log log;
  ASSERT_TRUE(transport->Connect(NodeId{2}, peer.address).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.up == 1; }));

  wire::FrameHeader good;
  good.kind = wire::Kind::kHello;
  good.version = wire::kHandshakeVersion;
  uint64_t expected_bad = 0;
  const auto expect_closed = [&](const char* what, const void* header, size_t header_bytes,
                                 size_t payload_bytes, uint32_t flags) {
    Stranger stranger(transport->address());
    stranger.Send(header, header_bytes, payload_bytes, UCP_AM_SEND_FLAG_REPLY | flags);
    ++expected_bad;
    EXPECT_TRUE(WaitFor(*transport, log, [&] {
      stranger.Progress();
      return transport->bad_frames() >= expected_bad && stranger.failed;
    })) << what;
    EXPECT_EQ(transport->bad_frames(), expected_bad) << what;
  };
  wire::FrameHeader header = good;
  expect_closed("no header", nullptr, 0, 10, 0);
  expect_closed("short header", &header, 63, 0, 0);
  unsigned char long_header[80] = {};
  expect_closed("long header", long_header, 80, 0, 0);
  expect_closed("zeros", long_header, 64, 0, 0);
  header.payload_bytes = 100;
  expect_closed("length too large", &header, 64, 99, 0);
  expect_closed("length too small", &header, 64, 101, 0);
  header.payload_bytes = wire::kPayloadBytesMax + 1;
  expect_closed("over the limit", &header, 64, wire::kPayloadBytesMax + 1, UCP_AM_SEND_FLAG_EAGER);
  expect_closed("over the limit, rendezvous", &header, 64, wire::kPayloadBytesMax + 1, UCP_AM_SEND_FLAG_RNDV);
  header.payload_bytes = UINT32_MAX;
  expect_closed("lying", &header, 64, 10, 0);
  header = good;
  header.version = 9;
  expect_closed("version", &header, 64, 0, 0);
  header = good;
  header.kind = wire::Kind::kPartial;
  header.version = wire::kVersion;
  expect_closed("before the handshake", &header, 64, 0, 0);
  // Rows apart from descriptors that are not theirs, or of which there are too many.
  struct {
    wire::FrameHeader header;
    std::byte descriptors[256] = {};
  } split;
  split.header = header;
  split.header.rows = 4;
  split.header.payload_bytes = 64 + 100;
  expect_closed("descriptors too short", &split, 64 + 32, 132, UCP_AM_SEND_FLAG_RNDV);
  expect_closed("descriptors too long", &split, 64 + 128, 36, UCP_AM_SEND_FLAG_RNDV);
  expect_closed("longer than the payload", &split, 64 + 256, 0, 0);

  // The good peer has not noticed anything.
  ASSERT_TRUE(transport->Send(NodeId{2}, MakeFrame(*transport, 100)).ok());
  ASSERT_TRUE(WaitFor(*transport, log, [&] { return log.frames == 1; }));
  EXPECT_TRUE(log.lost.empty());
  EXPECT_EQ(log.up, 1);
}

// ---- Rendezvous and options
// -----------------------------------------------------------------------------------

TEST(UcxRendezvous, LargeFramesAreReceivedInPlace) {
  // What an RDMA network does with large frames, forced upon tcp by a user's own setting.
  ASSERT_EQ(setenv("UCX_RNDV_THRESH", "16k", 1), 0);
  UcxOptions options;
  options.selection = UcxSelection::kTcp;
  const auto a = Make(1, options), b = Make(2, options);
  Log log_a;
  ASSERT_TRUE(a->Connect(NodeId{2}, b->address()).ok());
  int arrived = 0;
  const auto poll_b = [&] {
    b->Poll([&](Event& event) {
      if (event.kind != Event::Kind::kFrame) return;
      ++arrived;
      for (std::byte byte : event.frame.payload_span()) ASSERT_EQ(byte, std::byte{7});
    });
    return false;
  };
  ASSERT_TRUE(WaitFor(*a, log_a, [&] { return poll_b() || log_a.up == 1; }));
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(a->Send(NodeId{2}, MakeFrame(*a, 10000 + i * 13000)).ok());
  ASSERT_TRUE(WaitFor(*a, log_a, [&] { return poll_b() || arrived == 20; }));
  EXPECT_TRUE(WaitFor(*a, log_a, [&] {
    return poll_b() || (a->frames().frames_in_use() == 0 && b->frames().frames_in_use() == 0);
  }));
  unsetenv("UCX_RNDV_THRESH");
}

TEST(UcxOptions, PortInUseAndUnknownInterfaceAreErrors) {
  const auto transport = Make(1);
  const auto address = internal::ResolveHostPort(transport->address());
  UcxOptions options;
  options.port = address->port();
  const auto taken = CreateUcx(MakeIdentity(2), options);
  EXPECT_EQ(taken.status().code(), absl::StatusCode::kUnavailable) << taken.status();
  EXPECT_THAT(std::string(taken.status().message()), HasSubstr("listen on 127.0.0.1:"));
  options = {};
  options.interface = "no-such-interface";
  const auto unknown = CreateUcx(MakeIdentity(2), options);
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("lo (127.0.0.1)"));
  EXPECT_FALSE(ParseUcxSelection("shmem").ok());
}

TEST(UcxOptions, InterfaceMayBeAnAddressAndTheAdvertisedHostAnother) {
  UcxOptions options;
  options.interface = "127.0.0.1";
  options.advertise_host = "localhost";
  const auto a = Make(1, options), b = Make(2);
  EXPECT_THAT(a->address(), ::testing::StartsWith("localhost:"));
  Log log;
  ASSERT_TRUE(b->Connect(NodeId{1}, a->address()).ok());
  EXPECT_TRUE(WaitFor(*b, log, [&] {
    a->Poll([](Event&) {});
    return log.up == 1;
  }));
}

TEST(UcxOptions, AFixedPortCanBeTakenAgainAtOnce) {
  uint16_t port = 0;
  for (int round = 0; round < 3; ++round) {
    UcxOptions options;
    options.port = port;
    const auto server = Make(1, options);
    ASSERT_NE(server, nullptr) << "round " << round;
    port = internal::ResolveHostPort(server->address())->port();
    const auto client = Make(2);
    Log log;
    ASSERT_TRUE(client->Connect(NodeId{1}, server->address()).ok());
    ASSERT_TRUE(WaitFor(*client, log, [&] {
      server->Poll([](Event&) {});
      return log.up == 1;
    }));
  }
}

TEST(UcxSettings, SelectionsMeanWhatTheySay) {
  const auto tls = [](UcxSelection selection, bool loopback, bool rdma, bool cuda = false) -> std::string {
    for (const auto& setting : internal::SettingsFor(selection, "eth0", loopback, rdma, cuda)) {
      if (setting.name == "TLS") return setting.value;
    }
    return "UCX's choice";
  };
  EXPECT_EQ(tls(UcxSelection::kAuto, true, false), "posix,cma,tcp,self");
  EXPECT_EQ(tls(UcxSelection::kAuto, false, false), "tcp,self");
  EXPECT_EQ(tls(UcxSelection::kAuto, true, true), "UCX's choice");
  EXPECT_EQ(tls(UcxSelection::kShm, false, true), "posix,cma,tcp,self");
  EXPECT_EQ(tls(UcxSelection::kTcp, true, true), "tcp,self");
  EXPECT_EQ(tls(UcxSelection::kRdma, false, true), "UCX's choice");
  EXPECT_EQ(tls(UcxSelection::kAuto, true, false, true), "posix,cma,tcp,self,cuda_copy,cuda_ipc");
  EXPECT_EQ(tls(UcxSelection::kTcp, true, false, true), "tcp,self,cuda_copy,cuda_ipc");
  EXPECT_EQ(tls(UcxSelection::kAuto, true, true, true), "UCX's choice");
}

int Ip(const std::string& arguments) { return std::system(("ip " + arguments + " 2>/dev/null").c_str()); }

TEST(Interfaces, OneThatIsNotUpYetIsWaitedFor) {
  const std::string name = "mk" + std::to_string(::getpid() % 1'000'000);
  if (Ip("link add " + name + " type veth peer name " + name + "p") != 0)
    GTEST_SKIP() << "may not add network interfaces here";
  const absl::Cleanup remove = [&] { Ip("link del " + name); };
  EXPECT_TRUE(absl::IsUnavailable(internal::FindInterface(name).status()));
  EXPECT_TRUE(absl::IsUnavailable(internal::AwaitInterface(name, absl::Milliseconds(10)).status()));
  std::thread later([&] {
    absl::SleepFor(absl::Milliseconds(200));
    EXPECT_EQ(Ip("addr add 10.255.255.253/32 dev " + name), 0);
    EXPECT_EQ(Ip("link set " + name + " up"), 0);
    EXPECT_EQ(Ip("link set " + name + "p up"), 0);
  });
  const auto found = internal::AwaitInterface(name, absl::Seconds(10));
  later.join();
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->address.host(), "10.255.255.253");
  // A name that is none is not waited for.
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(absl::IsInvalidArgument(internal::AwaitInterface("none0", absl::Seconds(10)).status()));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
}

}  // namespace
}  // namespace minke::transport

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == minke::transport::kEchoArgument) {
    return minke::transport::EchoPeer(std::strtoull(argv[2], nullptr, 10), argv[3], std::atoi(argv[4]));
  }
  ::testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
