// A router's engine with rows in row memory (host memory posing as a GPU's) against the same rows in host
// memory: the same plans, and the same work.
#include "services/router/engine/router_engine.h"

#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/transport/testing/host_row_memory.h"
#include "services/router/engine/testing/router_cluster.h"
#include "services/router/gating/cpu_gate.h"
#include "services/router/router_service.h"

namespace minke::router {
namespace {

using namespace testing_support;
using transport::HostRowMemory;

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

std::unique_ptr<Gate> TheGate(int* device_calls = nullptr) {
  static ThreadPool pool(2);
  auto gate = CpuGate::Load(TheCheckpoint(), Precision::kBF16, pool).value();
  if (device_calls != nullptr) gate = std::make_unique<PosingGate>(std::move(gate), device_calls);
  return gate;
}

// Of a cluster of which all have some.
struct Memories {
  explicit Memories(int32_t blocks = 16)
      : router(Shape().row_bytes(), kBlockRows, blocks),
        origin(Shape().row_bytes(), kBlockRows, blocks),
        experts(Shape().row_bytes(), kBlockRows, 16) {}
  RouterCluster::Rows All() { return {.router = &router, .origin = &origin, .experts = &experts}; }
  HostRowMemory router, origin, experts;
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
  RouterCluster plain({}, TheGate());
  for (const bool gate_takes_device_rows : {true, false}) {
    Memories memories;
    int device_calls = 0;
    RouterCluster cluster(memories.All(), TheGate(gate_takes_device_rows ? &device_calls : nullptr));
    uint64_t step = 0;
    for (const uint32_t rows : kRowCounts) {
      const auto x = RandomRows(rows, rows);
      ++step;
      EXPECT_EQ(cluster.Dispatch(x, step), plain.Dispatch(x, step)) << rows << " rows";
    }
    EXPECT_EQ(device_calls, gate_takes_device_rows ? std::ssize(kRowCounts) : 0);
    EXPECT_GE(cluster.work_in_row_memory, std::ssize(kRowCounts));
    const absl::Time end = absl::Now() + absl::Seconds(20);
    while (memories.router.blocks_free() < 16 && absl::Now() < end) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_EQ(memories.router.blocks_free(), 16);
    EXPECT_EQ(memories.origin.blocks_free(), 16);
  }
  EXPECT_EQ(plain.work_in_row_memory, 0);
}

TEST(RouterEngine, OneRouterServesNodesWithAndWithoutRowMemory) {
  Memories memories;
  int device_calls = 0;
  RouterCluster plain({}, TheGate());
  RouterCluster host_origin({.router = &memories.router}, TheGate(&device_calls));
  RouterCluster host_router({.origin = &memories.origin, .experts = &memories.experts}, TheGate());
  const auto x = RandomRows(60, 3);
  const Outcome expected = plain.Dispatch(x, 1);
  EXPECT_EQ(host_origin.Dispatch(x, 1), expected);
  EXPECT_EQ(device_calls, 0);
  EXPECT_EQ(host_router.Dispatch(x, 1), expected);
}

TEST(RouterEngine, WithoutFreeBlocksEverythingTakesTheWayThroughTheHost) {
  Memories memories(/*blocks=*/1);
  int device_calls = 0;
  RouterCluster plain({}, TheGate()), cluster(memories.All(), TheGate(&device_calls));
  for (uint64_t step = 1; step < 5; ++step) {
    const auto x = RandomRows(100, static_cast<uint32_t>(step));
    EXPECT_EQ(cluster.Dispatch(x, step), plain.Dispatch(x, step));
  }
  EXPECT_GE(device_calls, 1);  // of the router's one block: the Dispatch's, so its work finds none
  EXPECT_EQ(cluster.work_in_row_memory, 0);
}

TEST(RouterEngine, RowsWithoutFiniteScoresAreRejectedWhereverTheyAre) {
  Memories memories;
  int device_calls = 0;
  RouterCluster plain({}, TheGate()), cluster(memories.All(), TheGate(&device_calls));
  auto x = RandomRows(20, 9);
  x[3 * Shape().hidden + 5] = F32ToBF16(std::numeric_limits<float>::quiet_NaN());
  const Outcome outcome = cluster.Dispatch(x, 1);
  EXPECT_EQ(outcome, plain.Dispatch(x, 1));
  EXPECT_EQ(outcome.weights[3 * Shape().top_k], wire::kRejectedRowWeight);
  EXPECT_EQ(outcome.work.lower_bound({53, 0})->first.first, 54u) << "row 3 goes to nobody";
}

// A gate that cannot be on a GPU, anywhere: an exact one.
TEST(RouterService, AGateThatCannotBeOnAGpuIsAnErrorUnlessTheCpuWillDo) {
  transport::InprocHub hub;
  const auto start = [&](bool device_optional) {
    const std::shared_ptr<const Checkpoint> checkpoint(&TheCheckpoint(), [](const Checkpoint*) {});
    return RouterService::Start(
               checkpoint, transport::CreateInproc(hub, {.node_id = kRouter, .role = 2}),
               {.precision = Precision::kExact, .device = Device::kCuda, .device_optional = device_optional})
        .status();
  };
  EXPECT_TRUE(absl::IsInvalidArgument(start(false))) << start(false);
  EXPECT_TRUE(start(true).ok()) << start(true);
}

}  // namespace
}  // namespace minke::router
