// Rows between the GPU memories of two processes over UCX. Needs a UCX that knows CUDA (docs/gpu.md).
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/transport/ucx/ucx.h"
#include "libs/wire/messages.h"
#include "tests/gpu/gpu_support.h"

namespace minke::transport {
namespace {

constexpr int64_t kRowBytes = 10240;  // V2's
constexpr int32_t kBlockRows = 25;
constexpr char kModeVariable[] = "MINKE_ROW_PEER", kFdVariable[] = "MINKE_ROW_PEER_FD";

Identity MakeIdentity(uint64_t id) {
  return {.node_id = NodeId{id}, .model_fingerprint = 5, .cluster_secret = "s"};
}

// The other process, which sends back what it gets until it is killed. Modes: "gpu": with row memory; "full":
// with row memory of which no block is ever free; "host": without.
TEST(RowTransportPeer, DISABLED_Echo) {
  const char* mode = std::getenv(kModeVariable);
  if (mode == nullptr) GTEST_SKIP() << "only as the other process";
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::unique_ptr<RowMemory> rows;
  if (std::string(mode) != "host") rows = MakeGpuRowMemory(kRowBytes, kBlockRows, 64).value();
  if (std::string(mode) == "full") {
    while (rows->TakeBlock() != nullptr) {
    }
  }
  UcxOptions options;
  options.transport.rows = rows.get();
  const auto transport = CreateUcx(MakeIdentity(2), options).value();
  const std::string line = transport->address() + "\n";
  const int fd = std::atoi(std::getenv(kFdVariable));
  ASSERT_EQ(write(fd, line.data(), line.size()), std::ssize(line));
  close(fd);
  for (;;) {
    transport->Wait(absl::Seconds(10));
    transport->Poll([&](Event& event) {
      if (event.kind == Event::Kind::kFrame)
        transport->Send(event.peer, std::move(event.frame)).IgnoreError();
    });
  }
}

class PeerProcess {
 public:
  explicit PeerProcess(const char* mode) {
    const bool second_gpu =
        cuda::DeviceCount().value_or(0) > 1 && std::getenv("CUDA_VISIBLE_DEVICES") == nullptr;
    int out[2];
    EXPECT_EQ(pipe(out), 0);
    fcntl(out[0], F_SETFD, FD_CLOEXEC);
    const std::string fd = std::to_string(out[1]);
    pid_ = fork();
    if (pid_ == 0) {
      setenv(kModeVariable, mode, 1);
      setenv(kFdVariable, fd.c_str(), 1);
      // On another GPU if there is one: two processes of one take turns on it, 150 us each.
      if (second_gpu) setenv("CUDA_VISIBLE_DEVICES", "1", 1);
      execl("/proc/self/exe", "gpu_services_test", "--gtest_filter=RowTransportPeer.*",
            "--gtest_also_run_disabled_tests", nullptr);
      _exit(127);
    }
    close(out[1]);
    char byte;
    while (read(out[0], &byte, 1) == 1 && byte != '\n') address += byte;
    close(out[0]);
  }
  ~PeerProcess() { Kill(); }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(std::exchange(pid_, -1), nullptr, 0);
  }
  std::string address;

 private:
  pid_t pid_ = -1;
};

class RowTransport : public ::testing::Test {
 protected:
  static constexpr int32_t kBlocks = 64;

  void SetUp() override {
    if (!UcxKnowsCuda()) GTEST_SKIP() << "this UCX has no CUDA";
    auto made = MakeGpuRowMemory(kRowBytes, kBlockRows, kBlocks);
    ASSERT_TRUE(made.ok()) << made.status();
    rows_ = *std::move(made);
    UcxOptions options;
    options.transport.rows = rows_.get();
    auto transport = CreateUcx(MakeIdentity(1), options);
    ASSERT_TRUE(transport.ok()) << transport.status();
    transport_ = *std::move(transport);
    ASSERT_EQ(transport_->row_memory(), rows_.get()) << "UCX does not carry rows";
  }
  void TearDown() override {
    frames_.clear();
    transport_.reset();
  }

  bool WaitFor(const std::function<bool()>& done, absl::Duration limit = absl::Seconds(20)) {
    const absl::Time end = absl::Now() + limit;
    while (!done()) {
      if (absl::Now() > end) return false;
      transport_->Wait(absl::Milliseconds(10));
      Poll();
    }
    return true;
  }
  void Poll() {
    transport_->Poll([&](Event& event) {
      if (event.kind == Event::Kind::kFrame) frames_.push_back(std::move(event.frame));
      up_ |= event.kind == Event::Kind::kPeerUp;
      lost_ |= event.kind == Event::Kind::kPeerLost;
    });
  }
  void Connect(const PeerProcess& peer) {
    ASSERT_FALSE(peer.address.empty());
    ASSERT_TRUE(transport_->Connect(NodeId{2}, peer.address).ok());
    ASSERT_TRUE(WaitFor([&] { return up_; }));
  }

  FrameRef MakeFrame(wire::Kind kind, uint32_t rows, uint32_t seed) {
    wire::FrameHeader header;
    header.kind = kind;
    header.rows = rows;
    header.pairs = kind == wire::Kind::kExpertWork ? 6 * rows : 0;
    header.step = seed;
    header.payload_bytes = wire::kPayloadBytesMax;
    const uint32_t offset = *wire::RowDataOffsetOf(header);
    header.payload_bytes = offset + static_cast<uint32_t>(rows * kRowBytes);
    FrameRef frame = transport_->frames().AllocateWithRows(header.payload_bytes, offset, *rows_);
    if (!frame) return frame;
    frame.header() = header;
    std::mt19937 random(seed);
    for (uint32_t i = 0; i < offset; ++i) frame.payload()[i] = static_cast<std::byte>(random());
    std::vector<std::byte> data(rows * kRowBytes);
    for (std::byte& byte : data) byte = static_cast<std::byte>(random());
    std::vector<RowCopy> copies;
    for (uint32_t i = 0; i < rows; ++i)
      copies.push_back({frame.device_rows() + i * kRowBytes, data.data() + i * kRowBytes, true});
    EXPECT_TRUE(rows_->CopyRows(copies).ok());
    return frame;
  }
  void ExpectIntact(const FrameRef& frame) {
    const wire::FrameHeader& header = frame.header();
    const uint32_t offset = *wire::RowDataOffsetOf(header);
    std::vector<std::byte> got(frame.payload(), frame.payload() + header.payload_bytes);
    if (frame.device_rows() != nullptr) {
      ASSERT_TRUE(
          rows_->CopyToHost(got.data() + offset, frame.device_rows(), header.payload_bytes - offset).ok());
    }
    std::mt19937 random(static_cast<uint32_t>(header.step));
    for (uint32_t i = 0; i < header.payload_bytes; ++i)
      ASSERT_EQ(got[i], static_cast<std::byte>(random())) << "byte " << i << " of " << header.rows << " rows";
  }
  // There and back, all kinds and some sizes.
  void ExpectEchoes(bool to_row_memory) {
    uint32_t seed = 0;
    for (const wire::Kind kind : {wire::Kind::kDispatch, wire::Kind::kExpertWork, wire::Kind::kPartial}) {
      for (const uint32_t rows : {1u, 2u, 6u, 7u, 13u, 25u}) {
        ASSERT_TRUE(transport_->Send(NodeId{2}, MakeFrame(kind, rows, ++seed)).ok());
        ASSERT_TRUE(WaitFor([&] { return !frames_.empty(); })) << ToString(kind) << " rows " << rows;
        EXPECT_EQ(frames_[0].device_rows() != nullptr, to_row_memory) << ToString(kind) << " rows " << rows;
        ExpectIntact(frames_[0]);
        frames_.clear();
      }
    }
    EXPECT_TRUE(WaitFor([&] { return rows_->blocks_free() == kBlocks; }));
  }

  std::unique_ptr<RowMemory> rows_;
  std::unique_ptr<Transport> transport_;
  std::vector<FrameRef> frames_;
  bool up_ = false, lost_ = false;
};

TEST_F(RowTransport, RowsGoFromGpuToGpu) {
  PeerProcess peer("gpu");
  Connect(peer);
  ExpectEchoes(/*to_row_memory=*/true);
}

TEST_F(RowTransport, RowsReachAProcessWithoutRowMemory) {
  PeerProcess peer("host");
  Connect(peer);
  ExpectEchoes(/*to_row_memory=*/false);
}

TEST_F(RowTransport, WithoutAFreeBlockRowsComeToHostMemory) {
  PeerProcess peer("full");
  Connect(peer);
  ExpectEchoes(/*to_row_memory=*/false);
}

// Without what only one host has: what a GPU's memory does over a plain network. The other process has the
// same environment.
TEST_F(RowTransport, RowsGoOverTcpToo) {
  ASSERT_EQ(setenv("UCX_TLS", "tcp,self,cuda_copy", 1), 0);
  transport_.reset();
  UcxOptions options;
  options.transport.rows = rows_.get();
  transport_ = CreateUcx(MakeIdentity(1), options).value();
  ASSERT_EQ(transport_->row_memory(), rows_.get());
  PeerProcess peer("gpu");
  Connect(peer);
  ExpectEchoes(/*to_row_memory=*/true);
  unsetenv("UCX_TLS");
}

// While nobody polls, the keepalive thread receives.
TEST_F(RowTransport, RowsArriveWhileTheEngineComputes) {
  PeerProcess peer("gpu");
  Connect(peer);
  for (uint32_t i = 0; i < 10; ++i)
    ASSERT_TRUE(transport_->Send(NodeId{2}, MakeFrame(wire::Kind::kPartial, 20, i)).ok());
  absl::SleepFor(absl::Seconds(1));
  ASSERT_TRUE(WaitFor([&] { return frames_.size() == 10; }));
  for (const FrameRef& frame : frames_) {
    EXPECT_NE(frame.device_rows(), nullptr);
    ExpectIntact(frame);
  }
}

TEST_F(RowTransport, APeerKilledInTheMiddleLeavesNoBlockBehind) {
  PeerProcess peer("gpu");
  Connect(peer);
  size_t echoed = 0;
  const absl::Time end = absl::Now() + absl::Seconds(30);
  for (uint32_t i = 0; !lost_ && absl::Now() < end; ++i) {
    if (FrameRef frame = MakeFrame(wire::Kind::kPartial, 20, i))
      transport_->Send(NodeId{2}, std::move(frame)).IgnoreError();
    Poll();
    echoed += frames_.size();
    frames_.clear();
    if (echoed > 100) peer.Kill();
  }
  EXPECT_GT(echoed, 100u);
  EXPECT_TRUE(lost_);
  EXPECT_TRUE(WaitFor([&] {
    frames_.clear();
    return rows_->blocks_free() == kBlocks && transport_->frames().frames_in_use() == 0;
  }));
}

TEST_F(RowTransport, RoundTripsAreTimed) {
  PeerProcess peer("gpu");
  Connect(peer);
  for (const uint32_t rows : {1u, 25u}) {
    FrameRef frame = MakeFrame(wire::Kind::kDispatch, rows, rows);
    constexpr int kTrips = 200;
    absl::Time begin;
    for (int i = -20; i < kTrips; ++i) {
      if (i == 0) begin = absl::Now();
      ASSERT_TRUE(transport_->Send(NodeId{2}, frame).ok());
      const absl::Time end = absl::Now() + absl::Seconds(20);
      while (frames_.empty() && absl::Now() < end) Poll();
      ASSERT_EQ(frames_.size(), 1u);
      frame = std::exchange(frames_, {})[0];
    }
    ExpectIntact(frame);
    std::printf("%u rows of %lld bytes there and back, %d GPUs: %.1f us\n", rows,
                static_cast<long long>(kRowBytes), cuda::DeviceCount().value() > 1 ? 2 : 1,
                absl::ToDoubleMicroseconds(absl::Now() - begin) / kTrips);
  }
}

}  // namespace
}  // namespace minke::transport
