// An expert server's engine with rows in row memory (host memory posing as a GPU's) against the same work
// with rows in host memory.
#include "services/experts/engine/expert_engine.h"

#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/cluster/row_shape.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/testing/host_row_memory.h"

namespace minke::experts {
namespace {

using transport::FrameRef;
using transport::HostRowMemory;

constexpr uint32_t kLayer = 1;
constexpr uint32_t kGroupsHosted = 6;  // of 8
constexpr NodeId kServer{1}, kOrigin{2};

const Checkpoint& TheCheckpoint() {
  static const std::unique_ptr<Checkpoint> checkpoint = [] {
    static const minke::testing_support::TempDir dir;
    MK_CHECK(MakeCheckpoint({.directory = dir.path() + "/model",
                             .config_json = minke::testing_support::TinyConfigJson(),
                             .seed = 5,
                             .threads = 2})
                 .ok());
    return Checkpoint::Open(dir.path() + "/model").value();
  }();
  return *checkpoint;
}
const wire::RowShape& Shape() {
  static const wire::RowShape shape = RowShapeOf(TheCheckpoint().config(), Precision::kBF16);
  return shape;
}

struct Message {
  std::vector<wire::WorkRow> rows;
  std::vector<wire::WorkPair> pairs;
  std::vector<bf16> data;
};

// Rows of six experts from three groups each, some of them groups that are not hosted.
Message RandomMessage(uint32_t rows, std::mt19937& rng) {
  Message message;
  std::normal_distribution<float> normal;
  for (uint32_t r = 0; r < rows; ++r) {
    std::set<uint16_t> experts;
    uint16_t groups[3];
    for (uint16_t& g : groups) g = rng() % 8;
    while (experts.size() < 6) experts.insert(static_cast<uint16_t>(groups[rng() % 3] * 20 + rng() % 20));
    wire::WorkRow row{.row = r};
    row.set_pairs(static_cast<uint32_t>(message.pairs.size()), 6);
    message.rows.push_back(row);
    for (const uint16_t e : experts) message.pairs.push_back({.weight = .1f * (1 + e % 7), .expert = e});
    for (int32_t c = 0; c < Shape().hidden; ++c) message.data.push_back(F32ToBF16(normal(rng)));
  }
  return message;
}

using RowKey = std::tuple<uint64_t, uint32_t, uint16_t>;  // message, row, group
struct Answers {
  std::map<RowKey, std::vector<std::byte>> sums;
  std::set<RowKey> rejected, nacked;
  int in_row_memory = 0, in_host_memory = 0;  // Partials
};

// The CPU's, whose first launch waits until it is told to go on, so that what is sent meanwhile is the
// second.
class HeldBackend final : public ExpertBackend {
 public:
  explicit HeldBackend(ExpertBackend& backend) : backend_(backend) {}
  absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(UnitId unit) override {
    return backend_.LoadUnit(unit);
  }
  absl::StatusOr<std::unique_ptr<UnitBuilder>> BuildUnit(UnitId unit) override {
    return backend_.BuildUnit(unit);
  }
  uint64_t UnitLayout(UnitId unit) const override { return backend_.UnitLayout(unit); }
  absl::Status Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                   std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                   std::span<uint8_t> finite) override {
    if (launches++ == 0) {
      EXPECT_TRUE(go.WaitForNotificationWithTimeout(absl::Seconds(20)));
    }
    int there = 0;
    for (const LaunchJob& job : jobs) there += job.in_row_memory;
    if (there > 0 && there < std::ssize(jobs)) ++mixed_launches;
    return backend_.Run(units, layer, jobs, rows, outs, finite);
  }
  absl::Notification go;
  int launches = 0, mixed_launches = 0;

 private:
  ExpertBackend& backend_;
};

class Server {
 public:
  // `server_rows`, `origin_rows`: row memory of either side, or null.
  explicit Server(transport::RowMemory* server_rows, transport::RowMemory* origin_rows)
      : pool_(2), load_pool_(2), rows_(server_rows) {
    backend_ = MakeBackend(TheCheckpoint(), {.rows = server_rows}, pool_, load_pool_).value();
    held_.emplace(*backend_);
    origin_ = transport::CreateInproc(hub_, {.node_id = kOrigin, .role = 3, .cluster_secret = "x"},
                                      {.rows = origin_rows});
    auto transport = transport::CreateInproc(hub_, {.node_id = kServer, .role = 4, .cluster_secret = "x"},
                                             {.rows = server_rows});
    const std::string address = transport->address();
    engine_.emplace(TheCheckpoint().config(), Precision::kBF16, std::move(transport), *held_,
                    ExpertEngineOptions{});
    for (uint32_t g = 0; g < kGroupsHosted; ++g)
      engine_->AddUnit({kLayer, g}, backend_->LoadUnit({kLayer, g}).value());
    thread_ = std::thread([this] { engine_->Run(); });
    EXPECT_TRUE(origin_->Connect(kServer, address).ok());
    for (bool up = false; !up;) {
      origin_->Poll([&](transport::Event& event) { up |= event.kind == transport::Event::Kind::kPeerUp; });
    }
  }
  ~Server() {
    if (!held_->go.HasBeenNotified()) held_->go.Notify();
    engine_->Stop();
    thread_.join();
  }
  HeldBackend& backend() { return *held_; }
  ExpertEngineStatus status() const { return engine_->status(); }

  // In row memory: `in_rows`, if a block is free.
  void Send(const Message& message, uint64_t step, bool in_rows) {
    const auto rows = static_cast<uint32_t>(message.rows.size());
    const auto pairs = static_cast<uint32_t>(message.pairs.size());
    const uint32_t bytes = wire::WorkPayloadBytes(Shape(), rows, pairs);
    const auto data_bytes = static_cast<uint32_t>(message.data.size() * sizeof(bf16));
    FrameRef frame;
    if (in_rows) frame = origin_->frames().AllocateWithRows(bytes, bytes - data_bytes, *rows_);
    if (!frame) frame = origin_->frames().Allocate(bytes);
    const wire::WorkSpans spans = wire::LayOutWork(Shape(), rows, pairs, frame.payload_span());
    std::copy(message.rows.begin(), message.rows.end(), spans.rows.begin());
    std::copy(message.pairs.begin(), message.pairs.end(), spans.pairs.begin());
    if (frame.device_rows() != nullptr) std::memset(spans.data, 0xff, data_bytes);  // nobody may look there
    std::memcpy(frame.device_rows() != nullptr ? frame.device_rows() : spans.data, message.data.data(),
                data_bytes);
    wire::FrameHeader& header = frame.header();
    header.kind = wire::Kind::kExpertWork;
    header.origin = kOrigin.value;
    header.step = step;
    header.layer = kLayer;
    header.rows = rows;
    header.pairs = pairs;
    header.payload_bytes = bytes;
    EXPECT_TRUE(origin_->Send(kServer, std::move(frame)).ok());
  }

  // Until `count` (row, group) pairs are answered.
  Answers Wait(size_t count) {
    Answers answers;
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    const auto size = [&] { return answers.sums.size() + answers.rejected.size() + answers.nacked.size(); };
    while (size() < count && absl::Now() < limit) {
      origin_->Poll([&](transport::Event& event) {
        if (event.kind == transport::Event::Kind::kFrame) Take(event.frame, answers);
      });
      origin_->Wait(absl::Milliseconds(10));
    }
    EXPECT_EQ(size(), count);
    return answers;
  }

 private:
  static void Take(const FrameRef& frame, Answers& answers) {
    const wire::FrameHeader& header = frame.header();
    const auto key = [&](const wire::PartialRow& row) { return RowKey{header.step, row.row, row.group}; };
    if (header.kind == wire::Kind::kPartial) {
      const auto view = wire::ReadPartial(Shape(), header, frame.payload_span());
      ASSERT_TRUE(view.ok()) << view.status();
      const bool there = frame.device_rows() != nullptr;
      ++(there ? answers.in_row_memory : answers.in_host_memory);
      const std::byte* row = there ? frame.device_rows() : view->data;
      for (const wire::PartialRow& partial : view->rows) {
        EXPECT_TRUE(answers.sums.emplace(key(partial), std::vector(row, row + Shape().row_bytes())).second);
        row += Shape().row_bytes();
      }
      return;
    }
    const auto view = wire::ReadRowList(Shape(), header, frame.payload_span());
    ASSERT_TRUE(view.ok()) << view.status();
    for (const wire::PartialRow& row : view->rows)
      (header.kind == wire::Kind::kReject ? answers.rejected : answers.nacked).insert(key(row));
  }

  ThreadPool pool_, load_pool_;
  transport::RowMemory* const rows_;
  transport::InprocHub hub_;
  std::unique_ptr<ExpertBackend> backend_;
  std::optional<HeldBackend> held_;
  std::unique_ptr<transport::Transport> origin_;
  std::optional<ExpertEngine> engine_;
  std::thread thread_;
};

// Two messages of many rows and 40 of few, after one that holds the engine up.
struct Work {
  std::vector<Message> messages;
  size_t pairs = 0;  // (row, group)
};
Work MakeWork(bool with_nan) {
  std::mt19937 rng(21);
  Work work;
  for (int i = 0; i < 43; ++i)
    work.messages.push_back(RandomMessage(i == 1 || i == 2 ? 500 : 1 + rng() % 4, rng));
  if (with_nan) {
    for (const uint32_t row : {3u, 77u, 499u}) work.messages[1].data[row * Shape().hidden + 5] = 0x7fc0;
    work.messages[4].data[0] = 0x7f80;  // of several rows, or the only one
    work.messages[5].data[0] = 0xff80;
  }
  for (const Message& message : work.messages) {
    for (const wire::WorkRow& row : message.rows) {
      std::set<int> groups;
      for (const auto& pair : std::span(message.pairs).subspan(row.pairs_begin(), row.pairs_count))
        groups.insert(pair.expert / 20);
      work.pairs += groups.size();
    }
  }
  return work;
}

// `in_rows`: which messages' rows are in row memory.
template <class InRows>
Answers RunAll(Server& server, const Work& work, InRows in_rows) {
  for (size_t i = 0; i < work.messages.size(); ++i) server.Send(work.messages[i], i, in_rows(i));
  absl::SleepFor(absl::Milliseconds(50));  // so that all are queued behind the first
  server.backend().go.Notify();
  return server.Wait(work.pairs);
}

void ExpectSame(const Answers& got, const Answers& want) {
  EXPECT_TRUE(got.sums == want.sums);
  EXPECT_EQ(got.rejected, want.rejected);
  EXPECT_EQ(got.nacked, want.nacked);
}

int32_t BlockRows() { return wire::DispatchRowsMax(Shape()); }

Answers InHostMemory(const Work& work) {
  Server server(nullptr, nullptr);
  return RunAll(server, work, [](size_t) { return false; });
}

TEST(ExpertEngineRows, AllInRowMemoryAreTheSameToTheBit) {
  const Work work = MakeWork(false);
  const Answers want = InHostMemory(work);
  EXPECT_GT(want.nacked.size(), 0u);
  EXPECT_EQ(want.in_row_memory, 0);
  HostRowMemory rows(Shape().row_bytes(), BlockRows(), 200);
  {
    Server server(&rows, &rows);
    const Answers got = RunAll(server, work, [](size_t) { return true; });
    ExpectSame(got, want);
    EXPECT_EQ(got.in_host_memory, 0);
    EXPECT_EQ(got.in_row_memory, want.in_host_memory);
  }
  EXPECT_EQ(rows.blocks_free(), 200) << "a block is lost";
}

TEST(ExpertEngineRows, ALaunchTakesRowsFromBoth) {
  const Work work = MakeWork(true);
  const Answers want = InHostMemory(work);
  EXPECT_GT(want.rejected.size(), 5u);
  HostRowMemory rows(Shape().row_bytes(), BlockRows(), 200);
  Server server(&rows, &rows);
  const Answers got = RunAll(server, work, [](size_t i) { return i % 2 == 1; });
  ExpectSame(got, want);
  EXPECT_EQ(got.in_host_memory, 0);
  EXPECT_GT(server.backend().mixed_launches, 0);
}

// Blocks for some of the messages, and for some or none of the answers: every mixture of where rejected
// rows' neighbours come from and go to.
TEST(ExpertEngineRows, WithoutFreeBlocksHostMemoryDoes) {
  const Work work = MakeWork(true);
  const Answers want = InHostMemory(work);
  bool both = false;
  for (const int blocks : {1, 2, 3, 5, 30, 45, 50}) {
    HostRowMemory rows(Shape().row_bytes(), BlockRows(), blocks);
    {
      Server server(&rows, &rows);
      const Answers got = RunAll(server, work, [](size_t i) { return i < 20; });
      ExpectSame(got, want);
      both |= got.in_row_memory > 0 && got.in_host_memory > 0;
    }
    EXPECT_EQ(rows.blocks_free(), blocks);
  }
  EXPECT_TRUE(both);
}

TEST(ExpertEngineRows, AnOriginWithoutRowMemoryIsAnswered) {
  const Work work = MakeWork(true);
  const Answers want = InHostMemory(work);
  HostRowMemory rows(Shape().row_bytes(), BlockRows(), 200);
  Server server(&rows, nullptr);
  ExpectSame(RunAll(server, work, [](size_t) { return false; }), want);
}

TEST(ExpertEngineRows, RowMemoryOfAnotherDeviceIsRefused) {
  HostRowMemory rows(Shape().row_bytes(), 4, 4);
  ThreadPool pool(1), load_pool(1);
  const auto backend =
      MakeBackend(TheCheckpoint(), {.device = Device::kCuda, .rows = &rows}, pool, load_pool);
  EXPECT_TRUE(absl::IsFailedPrecondition(backend.status())) << backend.status();
}

}  // namespace
}  // namespace minke::experts
