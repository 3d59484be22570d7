#include "cli/plan/model_cost.h"

#include <cmath>

#include "cli/plan/published.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

// Each number by hand, from the published dimensions.
TEST(ModelCost, OfV2) {
  const ModelCost c = CostOf(PublishedShape("v2"), ExpertsFormat::kBF16);
  // 2 (5120 x 1536 + 1536 x 128 x 192 + 5120 x 576 + 512 x 128 x 256 + 128 x 128 x 5120)
  EXPECT_DOUBLE_EQ(c.attention_flops, 298450944);
  EXPECT_DOUBLE_EQ(c.attention_bytes, 298450944);
  EXPECT_DOUBLE_EQ(c.core_flops, 278528);
  EXPECT_DOUBLE_EQ(c.naive_core_flops, 81920);
  EXPECT_DOUBLE_EQ(c.gate_flops, 1638400);
  EXPECT_DOUBLE_EQ(c.experts_per_row * c.expert_flops, 283115520);
  EXPECT_DOUBLE_EQ(c.shared_flops, 94371840);
  EXPECT_DOUBLE_EQ(c.dense_flops, 377487360);
  EXPECT_DOUBLE_EQ(c.head_flops, 1048576000);
  EXPECT_DOUBLE_EQ(c.expert_bytes, 47185920);
  EXPECT_DOUBLE_EQ(c.latent_bytes_per_token(), 69120);
  EXPECT_NEAR(c.core_flops / c.latent_bytes, 241.8, 0.05);
  EXPECT_EQ(c.units(), 59 * 8);
  EXPECT_DOUBLE_EQ(c.unit_bytes, 20 * 47185920.0);
  EXPECT_NEAR(c.routed_bytes() / 1e9, 445.4, 0.1);
  EXPECT_NEAR(c.attention_node_bytes() / 1e9, 25.9, 0.1);
  const double linear = c.layers * c.attention_flops + c.dense_flops + c.head_flops +
                        c.moe_layers * (c.gate_flops + c.shared_flops + c.experts_per_row * c.expert_flops);
  EXPECT_NEAR(linear / 1e9, 41.70, 0.01);
  EXPECT_NEAR((c.routed_bytes() + c.attention_node_bytes()) / 1e9, 471.5 - 0.1, 0.1) << "without gates";
}

TEST(ModelCost, OfV2Lite) {
  const ModelCost c = CostOf(PublishedShape("deepseek-v2-lite"), ExpertsFormat::kBF16);
  EXPECT_NEAR(c.attention_flops / 1e6, 27.53, 0.01);
  EXPECT_DOUBLE_EQ(c.core_flops, 34816);
  EXPECT_NEAR(c.core_flops / c.latent_bytes, 30.2, 0.05);
  EXPECT_NEAR(c.experts_per_row * c.expert_flops / 1e6, 103.81, 0.01);
  EXPECT_NEAR(c.expert_bytes / 1e6, 17.30, 0.01);
  EXPECT_DOUBLE_EQ(c.latent_bytes_per_token(), 31104);
  EXPECT_NEAR((c.routed_bytes() + c.attention_node_bytes()) / 1e9, 31.4, 0.05);
}

TEST(ModelCost, Fp8HalvesExpertsButForTheirScales) {
  const ModelCost c = CostOf(PublishedShape("v2"), ExpertsFormat::kFP8);
  EXPECT_NEAR(c.unit_bytes / 1e6, 472, 0.5);
  EXPECT_DOUBLE_EQ(c.attention_bytes, 298450944) << "attention stays bf16";
}

TEST(ModelCost, ExpertsTouched) {
  const ModelCost c = CostOf(PublishedShape("v2"), ExpertsFormat::kBF16);
  EXPECT_DOUBLE_EQ(c.TouchedShare(0), 0);
  EXPECT_DOUBLE_EQ(160 * c.TouchedShare(1), 6);
  EXPECT_NEAR(160 * c.TouchedShare(8), 42.2, 0.1);
  EXPECT_NEAR(160 * c.TouchedShare(32), 112.9, 0.1);
}

TEST(FanOut, OfRowsThatChooseEvenly) {
  const ModelConfig v2 = PublishedShape("v2"), lite = PublishedShape("v2-lite");
  EXPECT_NEAR(FanOutOver(v2, 8), 2.77, 0.005);
  EXPECT_NEAR(FanOutOver(lite, 8), 4.54, 0.005);
  EXPECT_DOUBLE_EQ(FanOutOver(v2, 1), 1);
  EXPECT_DOUBLE_EQ(FanOutOver(v2, 100), FanOutOver(v2, 8)) << "a layer has no more servers than groups";
  for (int servers = 2; servers <= 8; ++servers) {
    EXPECT_GT(FanOutOver(v2, servers), FanOutOver(v2, servers - 1));
    EXPECT_LE(FanOutOver(v2, servers), 3);
  }
}

}  // namespace
}  // namespace minke::cli
