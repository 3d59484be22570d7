#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/kernels/cpu/rope.h"
#include "libs/kernels/cpu/tile_kernels.h"
#include "libs/kernels/cpu/top_k.h"
#include "libs/kernels/reference/reference.h"

namespace minke::kernels {
namespace {

std::vector<float> RandomValues(std::mt19937& rng, int64_t n, Precision precision = Precision::kExact,
                                float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& v : values)
    v = precision == Precision::kExact ? normal(rng) : BF16ToF32(F32ToBF16(normal(rng)));
  return values;
}
std::vector<double> Wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }
std::vector<std::byte> Act(Precision precision, const std::vector<float>& x) {
  std::vector<std::byte> out(x.size() * ActivationBytes(precision));
  ToActivation(precision, x.data(), out.data(), static_cast<int64_t>(x.size()));
  return out;
}
PackedMatrix Pack(Precision precision, const std::vector<float>& w, int64_t n, int64_t k, ThreadPool& pool) {
  return PackedMatrix::Pack(
      precision, n, k,
      [&](int64_t row, std::span<float> out) { std::copy_n(w.begin() + row * k, k, out.begin()); }, pool);
}

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> isas;
  for (const Isa isa : kIsas) {
    if (IsaSupported(isa)) isas.push_back(isa);
  }
  return isas;
}

class EveryIsa : public testing::TestWithParam<Isa> {
 protected:
  const TileKernels& tiles_ = TileKernelsFor(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Isa, EveryIsa, testing::ValuesIn(SupportedIsas()),
                         [](const auto& info) { return std::string(TileKernelsFor(info.param).name); });

TEST_P(EveryIsa, GemmMatchesReferenceOnRaggedShapes) {
  std::mt19937 rng(1);
  ThreadPool pool(1);
  const int64_t depths[] = {1, 2, 3, 16, 24, 48, 97, 1024, 1025, 2100};
  for (int round = 0; round < 120; ++round) {
    const Precision precision = round % 2 == 0 ? Precision::kExact : Precision::kBF16;
    const int64_t m = 1 + rng() % (round % 3 == 0 ? 100 : 14), n = 1 + rng() % 64,
                  k = depths[rng() % std::size(depths)];
    const auto a = RandomValues(rng, m * k, precision), w = RandomValues(rng, n * k, precision);
    const PackedMatrix packed = Pack(precision, w, n, k, pool);
    const auto act = Act(precision, a);
    const int64_t ldc = n + rng() % 5;
    std::vector<float> c(m * ldc, 777.0f);
    if (precision == Precision::kExact) {
      tiles_.gemm_f32(packed.block_f32(0), 64, reinterpret_cast<const float*>(act.data()), k, c.data(), ldc,
                      m, n, k, false);
    } else {
      tiles_.gemm_bf16(packed.block_bf16(0), reinterpret_cast<const bf16*>(act.data()), k, c.data(), ldc, m,
                       n, k, false);
    }
    const auto want = reference::MatMul(Wide(a), Wide(w), m, n, k);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        ASSERT_NEAR(c[i * ldc + j], want[i * n + j], 3e-7 * k + 1e-5) << m << " " << n << " " << k;
      }
      for (int64_t j = n; j < ldc; ++j) ASSERT_EQ(c[i * ldc + j], 777.0f) << "wrote beyond n";
    }
  }
}

TEST_P(EveryIsa, RowsDoNotDependOnTheirNeighbours) {
  std::mt19937 rng(2);
  ThreadPool pool(1);
  for (const int64_t k : {24, 1500}) {
    const int64_t m = 23, n = 64;
    const auto a = RandomValues(rng, m * k), w = RandomValues(rng, n * k);
    const PackedMatrix packed = Pack(Precision::kExact, w, n, k, pool);
    std::vector<float> all(m * n), one(n);
    tiles_.gemm_f32(packed.block_f32(0), 64, a.data(), k, all.data(), n, m, n, k, false);
    for (int64_t i = 0; i < m; ++i) {
      tiles_.gemm_f32(packed.block_f32(0), 64, a.data() + i * k, k, one.data(), n, 1, n, k, false);
      ASSERT_EQ(std::memcmp(one.data(), all.data() + i * n, n * sizeof(float)), 0) << "row " << i;
    }
  }
}

TEST_P(EveryIsa, PairRowsLaysOutValuesForTheBf16Product) {
  std::mt19937 rng(5);
  for (const int64_t rows : {1, 2, 7, 64}) {
    for (const int64_t columns : {1, 24, 64}) {
      const int64_t ldx = columns + rng() % 9;
      std::vector<bf16> x(rows * ldx);
      for (bf16& v : x) v = static_cast<bf16>(1 + rng() % 60000);
      std::vector<bf16> out((rows + 1) / 2 * 128, bf16{7});
      tiles_.pair_rows(x.data(), ldx, rows, columns, out.data());
      for (int64_t i = 0; i < (rows + 1) / 2 * 2; ++i) {
        for (int64_t j = 0; j < 64; ++j) {
          const bf16 want = i < rows && j < columns ? x[i * ldx + j] : bf16{0};
          ASSERT_EQ(out[i / 2 * 128 + 2 * j + i % 2], want) << rows << " " << columns;
        }
      }
    }
  }
}

TEST_P(EveryIsa, ElementwiseKernelsMatchReference) {
  std::mt19937 rng(3);
  for (const int64_t n : {1, 5, 16, 24, 64, 100, 1003}) {
    const auto x = RandomValues(rng, n, Precision::kExact, 4), w = RandomValues(rng, n);
    std::vector<float> out(n);
    tiles_.rms_norm(x.data(), w.data(), 1e-6f, out.data(), n);
    const auto norm = reference::RmsNorm(Wide(x), Wide(w), 1e-6);
    for (int64_t i = 0; i < n; ++i) ASSERT_NEAR(out[i], norm[i], 1e-6 * (1 + std::abs(norm[i])));
    tiles_.silu_mul(x.data(), w.data(), out.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const double want = x[i] / (1 + std::exp(-double(x[i]))) * w[i];
      ASSERT_NEAR(out[i], want, 1e-6 * (1 + std::abs(want)));
    }
    std::vector<float> e = x;
    const float maximum = *std::max_element(x.begin(), x.end());
    EXPECT_EQ(tiles_.max(x.data(), n), maximum);
    const float sum = tiles_.exp_sum(e.data(), maximum, n);
    double want_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double want = std::exp(double(x[i]) - maximum);
      // The difference to the maximum is rounded to f32 before it is exponentiated.
      ASSERT_NEAR(e[i], want, (4e-7 + 1.2e-7 * (double(maximum) - x[i])) * want + 1e-38);
      want_sum += want;
    }
    EXPECT_NEAR(sum, want_sum, 1e-6 * want_sum);
    std::vector<bf16> narrow(n);
    tiles_.to_bf16(x.data(), narrow.data(), n);
    tiles_.to_f32(narrow.data(), out.data(), n);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(out[i], BF16ToF32(F32ToBF16(x[i])));
  }
}

TEST_P(EveryIsa, ExpIsExactAtZeroAndQuietAtTheEnds) {
  std::vector<float> x = {0, -1e-30f, -87, -88, -1000, -INFINITY};
  tiles_.exp_sum(x.data(), 0.0f, static_cast<int64_t>(x.size()));
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(x[1], 1.0f);
  EXPECT_NEAR(x[2], std::exp(-87.0), 1e-43);
  EXPECT_EQ(x[4], 0.0f);
  EXPECT_EQ(x[5], 0.0f);
}

TEST(MatMul, SplitsColumnsAndRowsAcrossThreads) {
  std::mt19937 rng(4);
  ThreadPool pool(3);
  for (const Precision precision : {Precision::kExact, Precision::kBF16}) {
    for (const auto& [m, n, k] : {std::tuple{1, 576, 64}, {7, 200, 160}, {250, 130, 48}, {0, 64, 64}}) {
      const auto a = RandomValues(rng, m * k, precision), w = RandomValues(rng, n * k, precision);
      const PackedMatrix packed = Pack(precision, w, n, k, pool);
      std::vector<float> c(m * n);
      MatMul(packed, Act(precision, a).data(), k, m, c.data(), n, pool);
      const auto want = reference::MatMul(Wide(a), Wide(w), m, n, k);
      for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(c[i], want[i], 1e-4);
    }
  }
}

ModelConfig V2Rope() {
  ModelConfig c;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.rope_theta = 10000;
  c.yarn = YarnConfig{40, 4096, 32, 1, 0.707, 0.707};
  return c;
}

TEST(Rope, YarnFrequenciesHaveTheSpecifiedValues) {
  const Rope rope(V2Rope());
  const auto f = rope.inv_freq();
  ASSERT_EQ(f.size(), 32u);
  EXPECT_NEAR(f[0], 1.0, 1e-12);
  EXPECT_NEAR(f[10], 0.056234133, 1e-9);
  EXPECT_NEAR(f[11], 0.039006927, 1e-9);
  EXPECT_NEAR(f[16], 0.0055, 1e-9);
  EXPECT_NEAR(f[22], 1.7782794e-4, 1e-11);
  EXPECT_NEAR(f[23], 3.3338036e-5, 1e-12);
  EXPECT_NEAR(f[31], 3.3338036e-6, 1e-13);
}

TEST(Rope, SoftmaxScaleUsesMscaleAllDim) {
  ModelConfig c = V2Rope();
  EXPECT_NEAR(c.softmax_scale(), 0.1147213868, 1e-10);
  c.yarn->mscale = 3;  // only scales cos and sin
  EXPECT_NEAR(c.softmax_scale(), 0.1147213868, 1e-10);
  c.yarn->mscale = c.yarn->mscale_all_dim = 1;
  EXPECT_NEAR(c.softmax_scale(), 0.1352337789, 1e-10);
  c.yarn.reset();
  EXPECT_NEAR(c.softmax_scale(), 0.0721687836, 1e-10);
}

TEST(Rope, UnequalMscalesScaleTheRotation) {
  ModelConfig c = V2Rope();
  std::vector<float> plain(64), scaled(64);
  Rope(c).Angles(5, plain.data());
  c.yarn->mscale = 1.0;
  Rope(c).Angles(5, scaled.data());
  const double ratio = (0.1 * std::log(40.0) + 1) / (0.0707 * std::log(40.0) + 1);
  for (int i = 0; i < 64; ++i) EXPECT_NEAR(scaled[i], plain[i] * ratio, 1e-6);
}

TEST(Rope, RotatesAdjacentPairsAtEveryPosition) {
  const ModelConfig c = V2Rope();
  const Rope rope(c);
  std::mt19937 rng(5);
  for (const int64_t position : {0, 1, 63, 4096, 5000, 163839}) {
    std::vector<float> angles(64), x = RandomValues(rng, 64);
    const std::vector<float> before = x;
    rope.Angles(position, angles.data());
    ApplyRope(angles.data(), 32, x.data());
    for (int i = 0; i < 32; ++i) {
      const double angle = position * rope.inv_freq()[i];
      EXPECT_NEAR(x[2 * i], before[2 * i] * std::cos(angle) - before[2 * i + 1] * std::sin(angle), 1e-5);
      EXPECT_NEAR(x[2 * i + 1], before[2 * i] * std::sin(angle) + before[2 * i + 1] * std::cos(angle), 1e-5);
    }
  }
}

ModelConfig Routing(int experts, int groups, int topk_group, int k, bool limited = true) {
  ModelConfig c;
  c.n_routed_experts = experts;
  c.n_group = groups;
  c.topk_group = topk_group;
  c.num_experts_per_tok = k;
  c.topk_method = limited ? TopkMethod::kGroupLimitedGreedy : TopkMethod::kGreedy;
  c.routed_scaling_factor = 16;
  return c;
}

TEST(RouteToken, NonFiniteLogitIsRejected) {
  const ModelConfig c = Routing(8, 2, 1, 2);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> logits(8, 0.5f), scratch(8), weights(2);
    std::vector<uint16_t> experts(2);
    logits[3] = bad;
    EXPECT_EQ(RouteToken(c, logits.data(), scratch.data(), experts.data(), weights.data()).code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(RouteToken, TieKeepsLowerExpertAndGroup) {
  const ModelConfig c = Routing(16, 4, 2, 3);
  std::vector<float> logits(16, 1.0f), scratch(16), weights(3);
  std::vector<uint16_t> experts(3);
  ASSERT_TRUE(RouteToken(c, logits.data(), scratch.data(), experts.data(), weights.data()).ok());
  EXPECT_EQ(experts, (std::vector<uint16_t>{0, 1, 2}));
}

TEST(RouteToken, GroupScoreIsItsMaximumNotItsSum) {
  // Group 1 has the larger sum of two, group 0 the larger maximum: V2 takes group 0.
  const ModelConfig c = Routing(8, 2, 1, 2);
  std::vector<float> logits = {5, 0, 0, 0, 4.9f, 4.9f, 4.9f, 4.9f}, scratch(8), weights(2);
  std::vector<uint16_t> experts(2);
  ASSERT_TRUE(RouteToken(c, logits.data(), scratch.data(), experts.data(), weights.data()).ok());
  EXPECT_EQ(experts, (std::vector<uint16_t>{0, 1}));
}

TEST(RouteToken, UnderflowingScoresStayInsideTheChosenGroups) {
  // All probabilities but one underflow to 0; masking with 0 would let experts of other groups in.
  const ModelConfig c = Routing(160, 8, 3, 6);
  std::vector<float> logits(160, -500.0f), scratch(160), weights(6);
  logits[150] = 100;
  logits[140] = -400;  // same group 7
  logits[30] = -300;   // group 1
  logits[70] = -310;   // group 3
  std::vector<uint16_t> experts(6);
  ASSERT_TRUE(RouteToken(c, logits.data(), scratch.data(), experts.data(), weights.data()).ok());
  for (const uint16_t e : experts) EXPECT_TRUE(e / 20 == 7 || e / 20 == 1 || e / 20 == 3) << e;
  EXPECT_EQ(std::count(experts.begin(), experts.end(), 150), 1);
  EXPECT_EQ(std::count(experts.begin(), experts.end(), 30), 1);
}

TEST(RouteToken, MatchesReferenceOnRandomShapes) {
  std::mt19937 rng(6);
  const ModelConfig shapes[] = {Routing(160, 8, 3, 6), Routing(64, 1, 1, 6, false), Routing(24, 4, 2, 5),
                                Routing(20, 1, 1, 3, false), Routing(160, 8, 8, 6)};
  for (int round = 0; round < 2000; ++round) {
    ModelConfig c = shapes[round % std::size(shapes)];
    c.norm_topk_prob = round % 3 == 0;
    const auto logits = RandomValues(rng, c.n_routed_experts, Precision::kExact, 3);
    const auto want = reference::RouteToken(c, Wide(logits));
    std::vector<float> scratch(c.n_routed_experts), weights(c.num_experts_per_tok);
    std::vector<uint16_t> experts(c.num_experts_per_tok);
    ASSERT_TRUE(RouteToken(c, logits.data(), scratch.data(), experts.data(), weights.data()).ok());
    for (int i = 0; i < c.num_experts_per_tok; ++i) {
      ASSERT_EQ(experts[i], want.experts[i]);
      ASSERT_NEAR(weights[i], want.weights[i], 2e-6 * want.weights[i]);  // scaled also when not renormalised
    }
  }
}

}  // namespace
}  // namespace minke::kernels
