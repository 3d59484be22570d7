// What tests of a router's engine share: a small model, and what came of a Dispatch.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/base/dtype.h"
#include "libs/base/status.h"
#include "libs/cluster/row_shape.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "libs/transport/inproc/inproc.h"
#include "services/router/engine/router_engine.h"

namespace minke::router::testing_support {

using transport::FrameRef;

inline constexpr uint32_t kLayer = 1;
inline constexpr NodeId kRouter{1}, kOrigin{2}, kExpertServers[] = {NodeId{3}, NodeId{4}};
inline constexpr int32_t kBlockRows = 256;

inline const Checkpoint& TheCheckpoint() {
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
inline const wire::RowShape& Shape() {
  static const wire::RowShape shape = RowShapeOf(TheCheckpoint().config(), Precision::kBF16);
  return shape;
}

// What came of one Dispatch.
struct Outcome {
  std::vector<uint16_t> experts;
  std::vector<float> weights;
  std::vector<NodeId> servers;  // of each (row, choice); none: nobody
  // (row, expert): weight and the row's data.
  std::map<std::pair<uint32_t, uint16_t>, std::pair<float, std::vector<std::byte>>> work;

  bool operator==(const Outcome&) const = default;
};

// A router's engine, and a test in the places of an attention node and of two expert servers.
class RouterCluster {
 public:
  // Row memory: of the router, of the attention node, of all expert servers.
  struct Rows {
    transport::RowMemory* router = nullptr;
    transport::RowMemory* origin = nullptr;
    transport::RowMemory* experts = nullptr;
  };
  RouterCluster(Rows rows, std::unique_ptr<Gate> gate) : pool_(2) {
    origin_ = Make(kOrigin, 3, rows.origin);
    std::map<UnitId, PlacementTable::Replicas> units;
    for (const UnitId unit : AllUnits(TheCheckpoint().config()))
      units[unit] = {{kExpertServers[unit.group % 2]}, {}};
    std::map<NodeId, std::string> addresses;
    for (const NodeId id : kExpertServers) {
      experts_[id] = Make(id, 4, rows.experts);
      addresses[id] = experts_[id]->address();
    }
    auto transport = Make(kRouter, 2, rows.router);
    const std::string address = transport->address();
    engine_ = std::make_unique<RouterEngine>(std::move(gate), Precision::kBF16, std::move(transport), pool_);
    engine_->UpdateCluster(addresses, std::make_shared<PlacementTable>(Epoch{1, 1}, units));
    thread_ = std::thread([this] { engine_->Run(); });
    MK_CHECK(origin_->Connect(kRouter, address).ok());
    bool up = false;
    const absl::Time end = absl::Now() + absl::Seconds(20);
    while (!(up && engine_->status().connected) && absl::Now() < end) {
      origin_->Poll([&](transport::Event& event) { up |= event.kind == transport::Event::Kind::kPeerUp; });
      for (auto& [id, expert] : experts_) expert->Poll([](transport::Event&) {});
    }
    MK_CHECK(up && engine_->status().connected);
  }
  ~RouterCluster() {
    engine_->Stop();
    thread_.join();
  }

  // In row memory, if there is some; else, or without a free block, in host memory.
  Outcome Dispatch(const std::vector<bf16>& x, uint64_t step) {
    const auto rows = static_cast<uint32_t>(x.size() / Shape().hidden);
    const auto bytes = static_cast<uint32_t>(rows * Shape().row_bytes());
    FrameRef frame;
    if (origin_->row_memory() != nullptr)
      frame = origin_->frames().AllocateWithRows(bytes, 0, *origin_->row_memory());
    if (!frame) frame = origin_->frames().Allocate(bytes);
    frame.header().kind = wire::Kind::kDispatch;
    frame.header().origin = kOrigin.value;
    frame.header().step = step;
    frame.header().layer = kLayer;
    frame.header().rows = rows;
    frame.header().row_begin = 50;
    const auto* from = reinterpret_cast<const std::byte*>(x.data());
    if (frame.device_rows() == nullptr) {
      std::memcpy(frame.payload(), from, bytes);
    } else {
      std::vector<transport::RowCopy> copies;
      for (uint32_t at = 0; at < bytes; at += static_cast<uint32_t>(Shape().row_bytes()))
        copies.push_back({frame.device_rows() + at, from + at, true});
      MK_CHECK(frame.row_memory()->CopyRows(copies).ok());
    }
    MK_CHECK(origin_->Send(kRouter, std::move(frame)).ok());

    Outcome outcome;
    bool planned = false;
    size_t expected = 0;
    const absl::Time end = absl::Now() + absl::Seconds(20);
    while ((!planned || outcome.work.size() < expected) && absl::Now() < end) {
      origin_->Poll([&](transport::Event& event) {
        if (event.kind != transport::Event::Kind::kFrame) return;
        const wire::FrameHeader& header = event.frame.header();
        const auto plan = wire::ReadRoutePlan(Shape(), header, event.frame.payload_span());
        ASSERT_TRUE(plan.ok()) << plan.status();
        EXPECT_EQ(header.step, step);
        planned = true;
        outcome.experts.assign(plan->experts.begin(), plan->experts.end());
        outcome.weights.assign(plan->weights.begin(), plan->weights.end());
        for (const uint16_t index : plan->server_index) {
          outcome.servers.push_back(index == wire::kNoServer ? NodeId{} : NodeId{plan->servers[index]});
          expected += index != wire::kNoServer;
        }
      });
      for (auto& [id, expert] : experts_) {
        expert->Poll([&, from = id](transport::Event& event) {
          if (event.kind == transport::Event::Kind::kFrame) Take(from, event.frame, outcome);
        });
      }
    }
    EXPECT_TRUE(planned);
    EXPECT_EQ(outcome.work.size(), expected);
    return outcome;
  }

  int work_in_row_memory = 0;
  const RouterEngine& engine() const { return *engine_; }

 private:
  std::unique_ptr<transport::Transport> Make(NodeId id, uint8_t role, transport::RowMemory* rows) {
    return transport::CreateInproc(hub_, {.node_id = id, .role = role}, {.rows = rows});
  }
  void Take(NodeId server, const FrameRef& frame, Outcome& outcome) {
    const auto work = wire::ReadWork(Shape(), frame.header(), frame.payload_span());
    ASSERT_TRUE(work.ok()) << work.status();
    work_in_row_memory += frame.device_rows() != nullptr;
    const std::byte* data = work->data;
    std::vector<std::byte> copied(work->rows.size() * Shape().row_bytes());
    if (frame.device_rows() != nullptr) {
      data = copied.data();
      ASSERT_TRUE(frame.row_memory()->CopyToHost(copied.data(), frame.device_rows(), copied.size()).ok());
    }
    for (size_t i = 0; i < work->rows.size(); ++i) {
      const std::byte* row = data + i * Shape().row_bytes();
      for (uint32_t p = 0; p < work->rows[i].pairs_count; ++p) {
        const wire::WorkPair& pair = work->pairs[work->rows[i].pairs_begin() + p];
        EXPECT_EQ(kExpertServers[TheCheckpoint().config().GroupOfExpert(pair.expert) % 2], server);
        const bool fresh = outcome.work
                               .emplace(std::pair(work->rows[i].row, pair.expert),
                                        std::pair(pair.weight, std::vector(row, row + Shape().row_bytes())))
                               .second;
        EXPECT_TRUE(fresh) << "sent twice";
      }
    }
  }

  ThreadPool pool_;
  transport::InprocHub hub_;
  std::unique_ptr<transport::Transport> origin_;
  std::map<NodeId, std::unique_ptr<transport::Transport>> experts_;
  std::unique_ptr<RouterEngine> engine_;
  std::thread thread_;
};

}  // namespace minke::router::testing_support
