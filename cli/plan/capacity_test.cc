#include "cli/plan/capacity.h"

#include <cmath>
#include <tuple>

#include "cli/plan/published.h"
#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"

namespace minke::cli {
namespace {

// 790 TFLOP/s and 4.3 TB/s for everything, reading and multiplying at once, nothing between: the basis of
// docs/planner.md's arithmetic.
Ceilings Ideal() {
  Ceilings c;
  c.name = "ideal";
  c.product_flops = c.decode_flops = c.prefill_flops = c.expert_flops = 790e12;
  c.expert_fp8_flops = 790e12;
  c.read_bytes_per_s = c.expert_bytes_per_s = c.expert_fp8_bytes_per_s = 4.3e12;
  c.memory_bytes = 149e9;
  c.overlap = 64;
  return c;
}

Hardware IdealHardware() {
  Hardware h;
  h.attention = h.expert = Ideal();
  h.network_bytes_per_s = 1e18;
  h.network_latency_s = 0;
  h.router_flops = 1e21;
  h.imbalance = 1;
  h.memory_share = 1;
  return h;
}

CapacityModel IdealModel(const char* name, double context) {
  Workload w;
  w.context = w.tokens_max = context;
  return CapacityModel(PublishedShape(name), IdealHardware(), w);
}

TEST(CapacityModel, RatioOfSaturatedPools) {
  // context, t_a, N_a / N_e without and with shared experts.
  const std::tuple<double, double, double, double> v2[] = {{1024, 0.739e-6, 2.06, 2.40},
                                                           {4096, 1.822e-6, 5.08, 5.42},
                                                           {8192, 3.266e-6, 9.11, 9.45},
                                                           {32768, 11.93e-6, 33.3, 33.6}};
  for (const auto& [context, t_a, ratio, with_shared] : v2) {
    const CapacityModel model = IdealModel("v2", context);
    EXPECT_NEAR(model.ExpertSecondsPerRow(), 0.3584e-6, 1e-10);
    EXPECT_NEAR(model.AttentionSecondsPerRow(false), t_a, 1e-3 * t_a + 1e-9);
    EXPECT_NEAR(model.AttentionSecondsPerRow(false) / model.ExpertSecondsPerRow(), ratio, 0.05);
    EXPECT_NEAR(model.SaturatedRatio(), with_shared, 0.05);
  }
  const CapacityModel lite = IdealModel("v2-lite", 4096);
  EXPECT_NEAR(lite.ExpertSecondsPerRow(), 0.1314e-6, 1e-10);
  EXPECT_NEAR(lite.AttentionSecondsPerRow(false), 1.132e-6, 1e-9);
  EXPECT_NEAR(lite.SaturatedRatio(), 8.9, 0.05);
}

TEST(CapacityModel, FloorsOfBandwidth) {
  const CapacityModel v2 = IdealModel("v2", 4096);
  // All experts of a layer from one GPU; many rows, so that all are touched, but few enough to be read-bound.
  const StepTime step = v2.Step({.attention = 1, .experts = 1, .microbatches = 1, .sequences = 400}, 0);
  EXPECT_NEAR(step.layer.experts_reading_s, 1756e-6, 1e-6);
  EXPECT_NEAR(v2.cost().attention_bytes / 4.3e12, 69.4e-6, 1e-7);
  EXPECT_NEAR(v2.SaturatingRows(), 4899, 1);
  EXPECT_NEAR(IdealModel("v2-lite", 4096).SaturatingRows(), 1960, 1);
}

// The worked example: V2, 4K, bf16: 434 sequences fit, 145 a microbatch, so 4,899 rows need 34 attention
// nodes, and those 6.6 expert servers.
TEST(CapacityModel, WorkedExample) {
  const CapacityModel model = IdealModel("v2", 4096);
  EXPECT_NEAR(static_cast<double>(model.SequencesMax()), 434, 1);
  const double rows = 145, nodes = std::ceil(model.SaturatingRows() / rows);
  EXPECT_EQ(nodes, 34);
  const double ratio = model.AttentionSecondsPerRow(false) / model.ExpertSecondsPerRow();
  EXPECT_NEAR(nodes / ratio, 6.7, 0.1);
  // With 34 : 8 (a layer's 8 groups each on its own server) neither pool waits much for the other.
  const StepTime step = model.Step({.attention = 34, .experts = 8, .microbatches = 3, .sequences = 435}, 0);
  EXPECT_NEAR(step.layer.experts_busy_s, 34 * 145 * 0.3584e-6 / 8, 3e-6);
  EXPECT_NEAR(step.rows_per_expert, 184, 1.5);
  EXPECT_GT(step.layer.experts_busy_s / (step.layer.attention_s + step.layer.shared_s), 0.7);
  EXPECT_EQ(step.bound, Bound::kAttention);
}

TEST(CapacityModel, LatentCacheOfASequence) {
  Workload w;
  w.context = w.tokens_max = 131072;
  const CapacityModel model(PublishedShape("v2"), IdealHardware(), w);
  EXPECT_NEAR(model.AttentionMemory({.sequences = 1}).cache / (1 << 30), 8.44, 0.01);
}

TEST(CapacityModel, PagesAreWhole) {
  Workload w;
  w.tokens_max = 65;
  const CapacityModel model(PublishedShape("v2"), IdealHardware(), w);
  EXPECT_DOUBLE_EQ(model.AttentionMemory({.sequences = 3}).cache, 3 * 128 * 69120.0);
}

TEST(CapacityModel, SlotsAreThePartAndOneInSixteen) {
  Hardware h = IdealHardware();
  h.replicas = 2, h.spare_slots = 3;
  const CapacityModel model(PublishedShape("v2"), h, {});
  EXPECT_EQ(model.SlotsOf(8), 118 + 3 + 8) << "2 x 472 units over 8; 118 / 16 up";
  EXPECT_EQ(model.SlotsOf(1), 472 + 3 + 30) << "no two replicas on one server";
}

TEST(CapacityModel, OneMicrobatchWaitsForItsWay) {
  const CapacityModel model = IdealModel("v2", 4096);
  const StepTime one = model.Step({.attention = 8, .experts = 4, .microbatches = 1, .sequences = 300}, 0);
  const LayerTimes& l = one.layer;
  EXPECT_EQ(one.bound, Bound::kLatency);
  EXPECT_NEAR(one.layer_round_s, l.attention_s + std::max(l.shared_s, l.network_s + l.experts_s), 1e-12);
  const StepTime two = model.Step({.attention = 8, .experts = 4, .microbatches = 2, .sequences = 300}, 0);
  EXPECT_GE(two.layer_round_s, 2 * two.layer.experts_busy_s);
}

// Every time grows with sequences, context and prompts, and none grows with faster hardware.
TEST(CapacityModel, IsMonotone) {
  Hardware h;
  h.attention = h.expert = BuiltInCeilings("h200").value();
  Workload w;
  w.prompt_tokens = 1000, w.output_tokens = 250;
  const ModelConfig v2 = PublishedShape("v2");
  const CapacityModel model(v2, h, w);
  Hardware better = h;
  better.network_bytes_per_s *= 2;
  better.expert.expert_flops *= 2;
  better.attention.decode_flops *= 2;
  const CapacityModel faster(v2, better, w);
  Workload longer = w;
  longer.context *= 2;
  const CapacityModel deeper(v2, h, longer);
  for (const int attention : {1, 3, 17}) {
    for (const int experts : {4, 7, 8, 20}) {
      for (const int microbatches : {1, 2, 3}) {
        double last = 0;
        for (const int64_t sequences : {3, 10, 64, 200, 600}) {
          const Pools pools{attention, experts, microbatches, sequences};
          const double step = model.Steady(pools).step_s;
          EXPECT_GT(step, last);
          EXPECT_LE(faster.Steady(pools).step_s, step);
          EXPECT_GE(deeper.Steady(pools).step_s, step);
          EXPECT_GE(model.Step(pools, 4.0 * sequences + 512).step_s, step);
          last = step;
        }
      }
    }
  }
}

TEST(CapacityModel, ReplicasRelieveArithmeticOnly) {
  Hardware h = IdealHardware();
  const Pools many{64, 16, 2, 400}, few{1, 16, 1, 4};
  const CapacityModel one(PublishedShape("v2"), h, {});
  h.replicas = 2;
  const CapacityModel two(PublishedShape("v2"), h, {});
  EXPECT_LT(two.Steady(many).layer.experts_s, 0.7 * one.Steady(many).layer.experts_s);
  EXPECT_DOUBLE_EQ(two.Steady(few).layer.experts_s, one.Steady(few).layer.experts_s);
}

// Against what an H200 does (docs/gpu_model.md): an attention node's layer with shared experts at context
// 4,096, an expert server of 20 experts with two pairs a row, and what crossing to the host adds.
TEST(CapacityModel, AgreesWithAnH200) {
  Hardware h;
  h.attention = h.expert = BuiltInCeilings("h200").value();
  h.imbalance = 1;
  const CapacityModel model(PublishedShape("v2"), h, {});
  for (const auto& [batch, us] : {std::pair{1, 160.0}, {16, 189.0}, {128, 428.0}}) {
    const LayerTimes l = model.Step({1, 8, 1, batch}, 0).layer;
    EXPECT_NEAR((l.attention_s + l.shared_s) * 1e6, us, 0.06 * us) << batch;
  }
  for (const auto& [batch, us, part] : {std::tuple{1, 31.0, 0.2}, {16, 49.0, 0.5}, {128, 394.0, 0.1}}) {
    EXPECT_NEAR(model.Step({1, 8, 1, batch}, 0).layer.crossing_s * 1e6, us, part * us) << batch;
  }
  Hardware on_gpu = h;
  on_gpu.attention = WithRowsInGpuMemory(h.attention);
  on_gpu.expert = WithRowsInGpuMemory(h.expert);
  const CapacityModel in_gpu_memory(PublishedShape("v2"), on_gpu, {});
  for (const auto& [batch, us] : {std::pair{1, 24.0}, {16, 21.0}, {128, 31.0}}) {
    EXPECT_NEAR(in_gpu_memory.Step({1, 8, 1, batch}, 0).layer.crossing_s * 1e6, us, 0.15 * us) << batch;
  }
  for (const auto& [rows, us, host_us] :
       {std::tuple{48, 239.0, 340.0}, {384, 262.0, 578.0}, {1837, 429.0, 1556.0}}) {
    const int64_t layer_rows = std::llround(rows * 8 / model.cost().groups_per_row);
    EXPECT_NEAR(in_gpu_memory.Step({1, 8, 1, layer_rows}, 0).layer.experts_s * 1e6, us, 0.15 * us) << rows;
    EXPECT_NEAR(model.Step({1, 8, 1, layer_rows}, 0).layer.experts_s * 1e6, host_us, 0.1 * host_us) << rows;
  }
  Hardware bare = h;
  bare.expert = WithoutCrossings(h.expert);
  const CapacityModel launches(PublishedShape("v2"), bare, {});
  for (const auto& [rows, us, part] :
       {std::tuple{48, 217.0, 0.05}, {384, 234.0, 0.05}, {1837, 402.0, 0.15}}) {
    // So many (row, group) of one group: rows x 8 / 2.77 of a layer, and pairs to match.
    const double layer_rows = rows * 8 / launches.cost().groups_per_row;
    const LayerTimes l = launches.Step({1, 8, 1, std::llround(layer_rows)}, 0).layer;
    EXPECT_NEAR(l.experts_s * 1e6, us, part * us) << rows;
  }
}

// A launch from messages in host memory to sums in host memory, one unit (docs/gpu.md, H100).
TEST(CapacityModel, AgreesWithLaunchesOfAnH100) {
  Hardware h;
  h.attention = h.expert = BuiltInCeilings("h100").value();
  h.imbalance = 1;
  const CapacityModel model(PublishedShape("v2"), h, {});
  for (const auto& [rows, us, part] :
       {std::tuple{48, 450.0, 0.06}, {384, 810.0, 0.15}, {1837, 2000.0, 0.05}}) {
    const double layer_rows = rows * 8 / model.cost().groups_per_row;
    const LayerTimes l = model.Step({1, 8, 1, std::llround(layer_rows)}, 0).layer;
    EXPECT_NEAR(l.experts_s * 1e6, us, part * us) << rows;
  }
}

// bench/pool_curve on 16 cores beside ceilings of the same run (docs/planner.md): waiting for experts, ms a
// step.
TEST(CapacityModel, AgreesWithThePoolCurve) {
  const auto config = ModelConfig::Load([] {
    static const testing_support::TempDir folder;
    std::filesystem::copy_file("bench/v2-bench.config.json", folder.path() + "/config.json",
                               std::filesystem::copy_options::overwrite_existing);
    return folder.path();
  }());
  ASSERT_TRUE(config.ok()) << config.status();
  for (const auto& [servers, measured_ms, part] :
       {std::tuple{1, 209.0, 0.05}, {2, 113.3, 0.05}, {4, 66.9, 0.2}, {8, 45.8, 0.2}}) {
    Hardware h;
    h.attention.product_flops = h.attention.decode_flops = h.attention.prefill_flops = 12.5e12;
    h.attention.read_bytes_per_s = 88e9;
    h.expert.expert_flops = 0.737e12;
    // Two threads' experts reach 19.9 of their 26.5 GB/s; all servers share the machine's 158.
    h.expert.expert_bytes_per_s = std::min(19.9e9, 19.9 / 26.5 * 158e9 / servers);
    h.network_latency_s = 50e-6;
    h.network_bytes_per_s = 10e9;
    h.router_flops = 600e9;
    Workload w;
    w.context = w.tokens_max = 40;
    const CapacityModel model(*config, h, w);
    const StepTime step = model.Steady({1, servers, 1, 64});
    const double waiting_s =
        model.cost().moe_layers * (step.layer.router_s + step.layer.network_s + step.layer.experts_s);
    EXPECT_NEAR(waiting_s * 1e3, measured_ms, part * measured_ms) << servers;
  }
}

}  // namespace
}  // namespace minke::cli
