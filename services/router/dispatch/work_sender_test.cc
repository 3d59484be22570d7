// Rows on a device (host memory posing as a GPU's) and in host memory, on their way to expert servers.
#include "services/router/dispatch/work_sender.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/base/status.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/testing/host_row_memory.h"

namespace minke::router {
namespace {

using transport::FrameRef;
using transport::HostRowMemory;
using transport::RowCopy;

constexpr NodeId kSender{1}, kFirst{2}, kSecond{3};
constexpr uint32_t kLayer = 3;
constexpr int32_t kBlockRows = 1024;

ModelConfig Config() {
  ModelConfig config;
  config.hidden_size = 32;
  config.n_routed_experts = 8;
  config.n_group = 4;
  config.topk_method = TopkMethod::kGroupLimitedGreedy;
  config.num_experts_per_tok = 3;
  return config;
}

// Counts what is asked of it; fails when told to.
class WatchedRowMemory final : public transport::RowMemory {
 public:
  WatchedRowMemory(int64_t row_bytes, int32_t blocks)
      : WatchedRowMemory(std::make_unique<std::byte[]>(row_bytes * kBlockRows * blocks), row_bytes, blocks) {}

  bool on_gpu() const override { return false; }
  absl::Status CopyToHost(std::byte* to, const std::byte* from, size_t bytes) override {
    ++to_host;
    if (broken) return absl::InternalError("broken");
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  }
  absl::Status CopyRows(std::span<const RowCopy> copies) override {
    ++copy_calls;
    for (const RowCopy& copy : copies) from_host += copy.from_host;
    if (broken) return absl::InternalError("broken");
    for (const RowCopy& copy : copies) std::memcpy(copy.to, copy.from, row_bytes());
    return absl::OkStatus();
  }

  bool broken = false;
  int to_host = 0, copy_calls = 0, from_host = 0;

 private:
  WatchedRowMemory(std::unique_ptr<std::byte[]> memory, int64_t row_bytes, int32_t blocks)
      : RowMemory(memory.get(), row_bytes, kBlockRows, blocks), memory_(std::move(memory)) {}
  const std::unique_ptr<std::byte[]> memory_;
};

// Groups 0 and 1 are the first server's, 2 and 3 the second's.
PlacementTable Placement() {
  return PlacementTable({1, 1}, {{{kLayer, 0}, {{kFirst}, {}}},
                                 {{kLayer, 1}, {{kFirst}, {}}},
                                 {{kLayer, 2}, {{kSecond}, {}}},
                                 {{kLayer, 3}, {{kSecond}, {}}}});
}

struct Arrived {
  std::map<std::pair<uint32_t, uint16_t>, float> pairs;  // (row, expert): weight
  std::map<uint32_t, std::vector<std::byte>> rows;
  int frames = 0, in_row_memory = 0;
};

class WorkSenderTest : public ::testing::Test {
 protected:
  // Expert servers have row memory if `theirs`; `blocks` is the sender's, 0: none.
  void Start(int32_t blocks, bool theirs = true) {
    if (blocks > 0) memory_.emplace(shape_.row_bytes(), blocks);
    sender_node_ = transport::CreateInproc(hub_, {.node_id = kSender, .role = 2},
                                           {.rows = blocks > 0 ? &*memory_ : nullptr});
    for (const NodeId id : {kFirst, kSecond}) {
      server_rows_.push_back(std::make_unique<HostRowMemory>(shape_.row_bytes(), kBlockRows, 8));
      servers_[id] = transport::CreateInproc(
          hub_, {.node_id = id, .role = 4},
          {.credit_rows = {credit_, credit_}, .rows = theirs ? server_rows_.back().get() : nullptr});
      MK_CHECK(sender_node_->Connect(id, servers_[id]->address()).ok());
    }
    int up = 0;
    for (const absl::Time end = absl::Now() + absl::Seconds(20); up < 2 && absl::Now() < end;) {
      sender_node_->Poll(
          [&](transport::Event& event) { up += event.kind == transport::Event::Kind::kPeerUp; });
      for (auto& [id, server] : servers_) server->Poll([](transport::Event&) {});
    }
    ASSERT_EQ(up, 2);
    sender_.emplace(config_, Precision::kBF16, *sender_node_);
  }

  // Row i has random data and three experts; every `host_every`-th is in host memory, the others on the
  // device, for which their memory poses.
  std::vector<WorkItem> Items(uint32_t rows, uint32_t host_every) {
    std::mt19937 random(rows);
    data_.resize(rows * shape_.row_bytes());
    for (std::byte& byte : data_) byte = static_cast<std::byte>(random());
    experts_.clear();
    weights_.clear();
    std::vector<WorkItem> items;
    for (uint32_t i = 0; i < rows; ++i) {
      std::vector<uint16_t> all = {0, 1, 2, 3, 4, 5, 6, 7};
      std::shuffle(all.begin(), all.end(), random);
      std::sort(all.begin(), all.begin() + shape_.top_k);
      for (int32_t e = 0; e < shape_.top_k; ++e) {
        experts_.push_back(all[e]);
        weights_.push_back(static_cast<float>(random() % 1000));
      }
    }
    for (uint32_t i = 0; i < rows; ++i) {
      WorkItem item{.row = 100 + i,
                    .data = data_.data() + i * shape_.row_bytes(),
                    .experts = &experts_[i * shape_.top_k],
                    .weights = &weights_[i * shape_.top_k]};
      item.groups = GroupMask(config_, {item.experts, static_cast<size_t>(shape_.top_k)});
      item.on_device = host_every == 0 || i % host_every != 0;
      items.push_back(item);
    }
    return items;
  }

  // The pairs of rows that were not sent.
  std::map<std::pair<size_t, uint32_t>, NodeId> Send(std::span<const WorkItem> items) {
    wire::FrameHeader exchange;
    exchange.layer = kLayer;
    exchange.step = 7;
    std::map<std::pair<size_t, uint32_t>, NodeId> assigned;
    sender_->Send(
        placement_, exchange, items, [](NodeId) { return true; },
        [&](size_t item, uint32_t group, NodeId server) {
          EXPECT_TRUE(assigned.emplace(std::pair(item, group), server).second) << "assigned twice";
        });
    return assigned;
  }

  Arrived Receive() {
    Arrived arrived;
    for (auto& [id, server] : servers_) {
      server->Poll([&](transport::Event& event) {
        if (event.kind != transport::Event::Kind::kFrame) return;
        const FrameRef& frame = event.frame;
        ++arrived.frames;
        arrived.in_row_memory += frame.device_rows() != nullptr;
        const auto work = wire::ReadWork(shape_, frame.header(), frame.payload_span());
        ASSERT_TRUE(work.ok()) << work.status();
        EXPECT_EQ(frame.header().step, 7u);
        const std::byte* data = frame.device_rows() == nullptr ? work->data : frame.device_rows();
        for (size_t i = 0; i < work->rows.size(); ++i) {
          const std::byte* row = data + i * shape_.row_bytes();
          arrived.rows[work->rows[i].row].assign(row, row + shape_.row_bytes());
          for (uint32_t p = 0; p < work->rows[i].pairs_count; ++p) {
            const wire::WorkPair& pair = work->pairs[work->rows[i].pairs_begin() + p];
            EXPECT_EQ(config_.GroupOfExpert(pair.expert) < 2, id == kFirst);
            EXPECT_TRUE(arrived.pairs.emplace(std::pair(work->rows[i].row, pair.expert), pair.weight).second);
          }
        }
      });
    }
    return arrived;
  }

  void ExpectAllArrived(std::span<const WorkItem> items, const Arrived& arrived) {
    ASSERT_EQ(arrived.rows.size(), items.size());
    EXPECT_EQ(arrived.pairs.size(), items.size() * shape_.top_k);
    for (const WorkItem& item : items) {
      const auto row = arrived.rows.find(item.row);
      ASSERT_NE(row, arrived.rows.end());
      EXPECT_EQ(std::memcmp(row->second.data(), item.data, shape_.row_bytes()), 0) << "row " << item.row;
      for (int32_t e = 0; e < shape_.top_k; ++e) {
        const auto pair = arrived.pairs.find({item.row, item.experts[e]});
        ASSERT_NE(pair, arrived.pairs.end());
        EXPECT_EQ(pair->second, item.weights[e]);
      }
    }
  }

  const ModelConfig config_ = Config();
  const wire::RowShape shape_ = RowShapeOf(config_, Precision::kBF16);
  const PlacementTable placement_ = Placement();
  uint32_t credit_ = 100000;
  std::vector<std::byte> data_;
  std::vector<uint16_t> experts_;
  std::vector<float> weights_;

  std::optional<WatchedRowMemory> memory_;
  std::vector<std::unique_ptr<HostRowMemory>> server_rows_;
  transport::InprocHub hub_;
  std::unique_ptr<transport::Transport> sender_node_;
  std::map<NodeId, std::unique_ptr<transport::Transport>> servers_;
  std::optional<WorkSender> sender_;
};

TEST_F(WorkSenderTest, HostRowsGoInHostMemoryAlsoWithRowMemory) {
  Start(8);
  const auto items = Items(50, /*host_every=*/1);
  for (const auto& [pair, server] : Send(items)) EXPECT_EQ(server, pair.second < 2 ? kFirst : kSecond);
  const Arrived arrived = Receive();
  ExpectAllArrived(items, arrived);
  EXPECT_EQ(arrived.in_row_memory, 0);
  EXPECT_EQ(memory_->copy_calls, 0);
}

TEST_F(WorkSenderTest, RowsOnTheDeviceAreGatheredWithOneCopyForAllMessages) {
  Start(8);
  const int32_t rows_max = MessageRowsMax(shape_);
  ASSERT_LT(rows_max, 2000);  // more than one message to each server
  const auto items = Items(2000, /*host_every=*/0);
  for (const auto& [pair, server] : Send(items)) EXPECT_EQ(server, pair.second < 2 ? kFirst : kSecond);
  EXPECT_EQ(memory_->copy_calls, 1);
  EXPECT_EQ(memory_->from_host, 0);
  EXPECT_EQ(memory_->to_host, 0);
  const Arrived arrived = Receive();
  ExpectAllArrived(items, arrived);
  EXPECT_EQ(arrived.frames, 4);
  EXPECT_EQ(memory_->blocks_free(), 8);
}

TEST_F(WorkSenderTest, AMessageOfBothKindsOfRowsIsOnTheDevice) {
  Start(8);
  const auto items = Items(60, /*host_every=*/3);
  Send(items);
  EXPECT_EQ(memory_->copy_calls, 1);
  EXPECT_GE(memory_->from_host, 20);
  const Arrived arrived = Receive();
  ExpectAllArrived(items, arrived);
  EXPECT_EQ(arrived.in_row_memory, 2);
}

TEST_F(WorkSenderTest, WithoutAFreeBlockRowsComeToTheHost) {
  Start(1);
  const auto items = Items(60, /*host_every=*/4);
  for (const auto& [pair, server] : Send(items)) EXPECT_NE(server, NodeId{});
  EXPECT_EQ(memory_->copy_calls, 1);
  EXPECT_GT(memory_->to_host, 0);
  const Arrived arrived = Receive();
  ExpectAllArrived(items, arrived);
  EXPECT_EQ(arrived.in_row_memory, 1);
}

TEST_F(WorkSenderTest, ServersWithoutRowMemoryGetTheSameRows) {
  Start(8, /*theirs=*/false);
  const auto items = Items(60, /*host_every=*/0);
  Send(items);
  const Arrived arrived = Receive();
  ExpectAllArrived(items, arrived);
  EXPECT_EQ(arrived.in_row_memory, 0);
}

TEST_F(WorkSenderTest, WithoutRowMemoryEverythingIsInHostMemory) {
  Start(0);
  const auto items = Items(60, /*host_every=*/1);
  Send(items);
  ExpectAllArrived(items, Receive());
}

TEST_F(WorkSenderTest, ADeviceThatFailsSendsNothingAndKeepsNoBlock) {
  Start(1);
  memory_->broken = true;
  const auto items = Items(60, /*host_every=*/0);
  const auto assigned = Send(items);  // one message in a block, one that was to come to the host
  for (const auto& [pair, server] : assigned) EXPECT_EQ(server, NodeId{});
  EXPECT_FALSE(assigned.empty());
  EXPECT_EQ(Receive().frames, 0);
  EXPECT_EQ(memory_->blocks_free(), 1);
  memory_->broken = false;
  Send(items);
  ExpectAllArrived(items, Receive());
}

TEST_F(WorkSenderTest, RowsBeyondTheCreditAreNotSent) {
  credit_ = 1;
  Start(8);
  const auto items = Items(60, /*host_every=*/0);
  for (const auto& [pair, server] : Send(items)) EXPECT_EQ(server, NodeId{});
  EXPECT_EQ(memory_->copy_calls, 0);
  EXPECT_EQ(memory_->blocks_free(), 8);
  EXPECT_EQ(Receive().frames, 0);
}

}  // namespace
}  // namespace minke::router
