// A router with its gate on the GPU.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "libs/gpu_rows/gpu_rows.h"
#include "services/router/engine/testing/router_cluster.h"
#include "services/router/gating/cpu_gate.h"
#include "services/router/gating/cuda_gate.h"
#include "tests/gpu/gpu_support.h"

namespace minke::router {
namespace {

using namespace testing_support;
using cuda::testing_support::RandomBF16;

constexpr int64_t kRowsMax = 256;

struct Routes {
  std::vector<uint16_t> experts;
  std::vector<float> weights, scores;
  std::vector<GateResult> results;
  bool operator==(const Routes&) const = default;
};

Routes RouteRows(Gate& gate, const std::byte* x, int64_t rows, bool on_device) {
  static ThreadPool pool(2);
  const int64_t k = Shape().top_k;
  Routes routes;
  routes.experts.resize(rows * k);
  routes.weights.resize(rows * k);
  routes.results.resize(rows);
  const auto route = on_device ? &Gate::RouteDeviceRows : &Gate::Route;
  (gate.*route)(kLayer, 0, x, rows, routes.experts.data(), routes.weights.data(), routes.results.data(),
                pool);
  routes.scores.assign(gate.scores(), gate.scores() + rows * Shape().num_experts);
  return routes;
}
Routes RouteRows(Gate& gate, const std::vector<bf16>& x) {
  return RouteRows(gate, reinterpret_cast<const std::byte*>(x.data()), std::ssize(x) / Shape().hidden, false);
}

std::unique_ptr<Gate> OnGpu() {
  auto gate = CudaGate::Load(TheCheckpoint(), kRowsMax);
  EXPECT_TRUE(gate.ok()) << gate.status();
  return *std::move(gate);
}
std::unique_ptr<Gate> OnCpu() {
  static ThreadPool pool(2);
  return CpuGate::Load(TheCheckpoint(), Precision::kBF16, pool).value();
}

// Scores may differ in their last digits, so a choice may where two of them are as near.
TEST(GateOnGpu, AgreesWithTheCpu) {
  std::mt19937 rng(1);
  const auto gpu = OnGpu(), cpu = OnCpu();
  const int64_t k = Shape().top_k, n = Shape().num_experts;
  int64_t all = 0, different = 0;
  for (const int64_t rows : {1, 2, 25, 64, 255, 256}) {
    const auto x = RandomBF16(rng, rows * Shape().hidden);
    const Routes got = RouteRows(*gpu, x), want = RouteRows(*cpu, x);
    EXPECT_EQ(got.results, want.results);
    for (int64_t i = 0; i < rows * n; ++i)
      ASSERT_NEAR(got.scores[i], want.scores[i], 1e-3f * want.scores[i]) << "row " << i / n;
    for (int64_t r = 0; r < rows; ++r) {
      const auto* chosen = &got.experts[r * k];
      EXPECT_TRUE(std::is_sorted(chosen, chosen + k));
      ++all;
      if (!std::equal(chosen, chosen + k, &want.experts[r * k])) {
        ++different;
        continue;
      }
      for (int64_t e = r * k; e < (r + 1) * k; ++e)
        ASSERT_NEAR(got.weights[e], want.weights[e], 1e-3f * want.weights[e]) << "row " << r;
    }
  }
  EXPECT_LE(different, all / 50);
}

TEST(GateOnGpu, RowsOnTheDeviceAndInHostMemoryAreRoutedTheSame) {
  std::mt19937 rng(2);
  const auto gate = OnGpu();
  const auto stream = cuda::Stream::Create();
  for (const int64_t rows : {1, 7, 100, 256}) {
    auto x = RandomBF16(rng, rows * Shape().hidden);
    if (rows > 1) x[Shape().hidden + 3] = F32ToBF16(std::numeric_limits<float>::infinity());
    const auto device = cuda::testing_support::ToDevice(x, *stream);
    ASSERT_TRUE(stream->Synchronize().ok());
    Routes on_device = RouteRows(*gate, device.as<std::byte>(), rows, true), on_host = RouteRows(*gate, x);
    EXPECT_EQ(on_device.results, on_host.results);
    for (int64_t r = 0; r < rows; ++r) {
      const bool rejected = rows > 1 && r == 1;
      EXPECT_EQ(on_host.results[r], rejected ? GateResult::kRejected : GateResult::kRouted) << "row " << r;
      if (rejected) {
        EXPECT_TRUE(std::isnan(on_host.scores[r * Shape().num_experts]));
        continue;
      }
      const int64_t k = Shape().top_k;
      EXPECT_TRUE(
          std::equal(&on_host.experts[r * k], &on_host.experts[r * k] + k, &on_device.experts[r * k]));
      EXPECT_TRUE(
          std::equal(&on_host.weights[r * k], &on_host.weights[r * k] + k, &on_device.weights[r * k]));
    }
  }
}

TEST(GateOnGpu, ExpertsCanBeForced) {
  std::mt19937 rng(3);
  const auto gpu = OnGpu(), cpu = OnCpu();
  for (Gate* gate : {gpu.get(), cpu.get()}) {
    gate->SetOverrideForTest([](int32_t, uint32_t row, std::span<uint16_t> experts) {
      for (size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<uint16_t>(row + 2 * e);
      return true;
    });
  }
  const auto x = RandomBF16(rng, 20 * Shape().hidden);
  const Routes got = RouteRows(*gpu, x), want = RouteRows(*cpu, x);
  EXPECT_EQ(got.experts, want.experts);
  for (size_t i = 0; i < got.weights.size(); ++i)
    EXPECT_NEAR(got.weights[i], want.weights[i], 1e-3f * want.weights[i]);
}

// All roles of one process share a row memory, so messages are handed over as they are.
TEST(RouterOnGpu, RowsInGpuMemoryGoOnAsTheyCame) {
  std::mt19937 rng(4);
  const auto memory = MakeGpuRowMemory(Shape().row_bytes(), kBlockRows, 32);
  ASSERT_TRUE(memory.ok()) << memory.status();
  // The same gate on both sides: then every number is the same.
  RouterCluster host({}, OnGpu());
  {
    RouterCluster cluster({.router = memory->get(), .origin = memory->get(), .experts = memory->get()},
                          OnGpu());
    uint64_t step = 0;
    for (const int64_t rows : {1, 2, 25, 100, 250}) {
      const auto x = RandomBF16(rng, rows * Shape().hidden);
      ++step;
      EXPECT_EQ(cluster.Dispatch(x, step), host.Dispatch(x, step)) << rows << " rows";
    }
    EXPECT_GE(cluster.work_in_row_memory, 5);
    EXPECT_EQ(cluster.engine().status().bad_frames, 0u);
  }
  EXPECT_EQ((*memory)->blocks_free(), 32);
  EXPECT_EQ(host.work_in_row_memory, 0);
}

}  // namespace
}  // namespace minke::router
