// A router's engine with rows in row memory (host memory posing as a GPU's) against the same rows in host
// memory: the same plans, and the same work.
#include "services/router/engine/router_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/base/status.h"
#include "libs/cluster/row_shape.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/testing/host_row_memory.h"
#include "services/router/gating/cpu_gate.h"

namespace minke::router {
namespace {

using transport::FrameRef;
using transport::HostRowMemory;

constexpr uint32_t kLayer = 1;
constexpr NodeId kRouter{1}, kOrigin{2}, kExpertServers[] = {NodeId{3}, NodeId{4}};
constexpr int32_t kBlockRows = 256;

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

// The CPU's gate, for which host memory may pose as a device's.
class PosingGate final : public Gate {
 public:
  PosingGate(std::unique_ptr<Gate> gate, int* device_calls)
      : Gate(gate->config()), gate_(std::move(gate)), device_calls_(device_calls) {}
  bool HasLayer(int32_t layer) const override { return gate_->HasLayer(layer); }
  void Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
             float* weights, GateResult* results, ThreadPool& pool) override {
    gate_->Route(layer, row_begin, x, rows, experts, weights, results, pool);
  }
  bool takes_device_rows() const override { return true; }
  void RouteDeviceRows(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
                       float* weights, GateResult* results, ThreadPool& pool) override {
    ++*device_calls_;
    gate_->Route(layer, row_begin, x, rows, experts, weights, results, pool);
  }
  const float* scores() const override { return gate_->scores(); }

 private:
  const std::unique_ptr<Gate> gate_;
  int* const device_calls_;
};

// What came of one Dispatch.
struct Outcome {
  std::vector<uint16_t> experts;
  std::vector<float> weights;
  std::vector<NodeId> servers;  // of each (row, choice); none: nobody
  // (row, expert): weight and the row's data.
  std::map<std::pair<uint32_t, uint16_t>, std::pair<float, std::vector<std::byte>>> work;

  bool operator==(const Outcome&) const = default;
};

class Cluster {
 public:
  // Row memory: of the router, of the attention node, of the expert servers.
  struct Rows {
    transport::RowMemory* router = nullptr;
    transport::RowMemory* origin = nullptr;
    bool experts = false;
  };
  Cluster(Rows rows, bool gate_takes_device_rows) : pool_(2) {
    auto gate = CpuGate::Load(TheCheckpoint(), Precision::kBF16, pool_).value();
    if (gate_takes_device_rows) gate = std::make_unique<PosingGate>(std::move(gate), &device_calls_);
    origin_ = Make(kOrigin, 3, rows.origin);
    std::map<UnitId, PlacementTable::Replicas> units;
    for (const UnitId unit : AllUnits(TheCheckpoint().config()))
      units[unit] = {{kExpertServers[unit.group % 2]}, {}};
    std::map<NodeId, std::string> addresses;
    for (const NodeId id : kExpertServers) {
      expert_rows_.push_back(std::make_unique<HostRowMemory>(Shape().row_bytes(), kBlockRows, 16));
      experts_[id] = Make(id, 4, rows.experts ? expert_rows_.back().get() : nullptr);
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
  ~Cluster() {
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
    std::memcpy(frame.device_rows() == nullptr ? frame.payload() : frame.device_rows(), x.data(), bytes);
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

  int device_calls() const { return device_calls_; }
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
    const std::byte* data = frame.device_rows() == nullptr ? work->data : frame.device_rows();
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
  int device_calls_ = 0;
  transport::InprocHub hub_;
  std::vector<std::unique_ptr<HostRowMemory>> expert_rows_;
  std::unique_ptr<transport::Transport> origin_;
  std::map<NodeId, std::unique_ptr<transport::Transport>> experts_;
  std::unique_ptr<RouterEngine> engine_;
  std::thread thread_;
};

std::vector<bf16> RandomRows(uint32_t rows, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> x(size_t{rows} * Shape().hidden);
  for (bf16& value : x) value = F32ToBF16(normal(random));
  return x;
}

constexpr uint32_t kRowCounts[] = {1, 2, 17, 100, 250};

TEST(RouterEngine, RowsInRowMemoryAreRoutedAndSentAsThoseInHostMemory) {
  Cluster plain({}, false);
  for (const bool gate_takes_device_rows : {true, false}) {
    HostRowMemory router_rows(Shape().row_bytes(), kBlockRows, 16),
        origin_rows(Shape().row_bytes(), kBlockRows, 4);
    Cluster cluster({.router = &router_rows, .origin = &origin_rows, .experts = true},
                    gate_takes_device_rows);
    uint64_t step = 0;
    for (const uint32_t rows : kRowCounts) {
      const auto x = RandomRows(rows, rows);
      ++step;
      EXPECT_EQ(cluster.Dispatch(x, step), plain.Dispatch(x, step)) << rows << " rows";
    }
    EXPECT_EQ(cluster.device_calls(), gate_takes_device_rows ? std::ssize(kRowCounts) : 0);
    EXPECT_GE(cluster.work_in_row_memory, std::ssize(kRowCounts));
    const absl::Time end = absl::Now() + absl::Seconds(20);
    while (router_rows.blocks_free() < 16 && absl::Now() < end) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_EQ(router_rows.blocks_free(), 16);
    EXPECT_EQ(origin_rows.blocks_free(), 4);
  }
  EXPECT_EQ(plain.work_in_row_memory, 0);
}

TEST(RouterEngine, OneRouterServesNodesWithAndWithoutRowMemory) {
  Cluster plain({}, false);
  HostRowMemory router_rows(Shape().row_bytes(), kBlockRows, 16),
      origin_rows(Shape().row_bytes(), kBlockRows, 4);
  Cluster host_origin({.router = &router_rows}, true);
  Cluster host_router({.origin = &origin_rows, .experts = true}, false);
  const auto x = RandomRows(60, 3);
  const Outcome expected = plain.Dispatch(x, 1);
  EXPECT_EQ(host_origin.Dispatch(x, 1), expected);
  EXPECT_EQ(host_origin.device_calls(), 0);
  EXPECT_EQ(host_router.Dispatch(x, 1), expected);
}

TEST(RouterEngine, WithoutFreeBlocksEverythingTakesTheWayThroughTheHost) {
  Cluster plain({}, false);
  HostRowMemory router_rows(Shape().row_bytes(), kBlockRows, 1),
      origin_rows(Shape().row_bytes(), kBlockRows, 1);
  Cluster cluster({.router = &router_rows, .origin = &origin_rows, .experts = true}, true);
  for (uint64_t step = 1; step < 5; ++step) {
    const auto x = RandomRows(100, static_cast<uint32_t>(step));
    EXPECT_EQ(cluster.Dispatch(x, step), plain.Dispatch(x, step));
  }
  EXPECT_EQ(cluster.device_calls(), 4);  // the one block is the Dispatch's
  EXPECT_EQ(cluster.work_in_row_memory, 0);
}

TEST(RouterEngine, RowsWithoutFiniteScoresAreRejectedWhereverTheyAre) {
  HostRowMemory router_rows(Shape().row_bytes(), kBlockRows, 16),
      origin_rows(Shape().row_bytes(), kBlockRows, 4);
  Cluster plain({}, false), cluster({.router = &router_rows, .origin = &origin_rows, .experts = true}, true);
  auto x = RandomRows(20, 9);
  x[3 * Shape().hidden + 5] = F32ToBF16(std::numeric_limits<float>::quiet_NaN());
  const Outcome outcome = cluster.Dispatch(x, 1);
  EXPECT_EQ(outcome, plain.Dispatch(x, 1));
  EXPECT_EQ(outcome.weights[3 * Shape().top_k], wire::kRejectedRowWeight);
  EXPECT_EQ(outcome.work.lower_bound({53, 0})->first.first, 54u) << "row 3 goes to nobody";
}

}  // namespace
}  // namespace minke::router
