#include "libs/kernels/cuda/gate.h"

#include <algorithm>

#include "libs/kernels/cpu/top_k.h"
#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

struct Shape {
  int experts, hidden, k, groups, topk_groups;
  bool normalise = false;
};

ModelConfig ConfigOf(const Shape& s) {
  ModelConfig config;
  config.n_routed_experts = s.experts;
  config.hidden_size = s.hidden;
  config.num_experts_per_tok = s.k;
  config.n_group = s.groups;
  config.topk_group = s.topk_groups;
  config.topk_method = s.groups > 1 ? TopkMethod::kGroupLimitedGreedy : TopkMethod::kGreedy;
  config.routed_scaling_factor = 16;
  config.norm_topk_prob = s.normalise;
  return config;
}

struct Result {
  std::vector<int32_t> experts;
  std::vector<float> weights, logits;
  std::vector<uint8_t> status;
};

Result Route(const Shape& s, const std::vector<bf16>& x, const std::vector<bf16>& w, Path path,
             int32_t used = -1) {
  auto stream = Stream::Create();
  const int64_t rows = std::ssize(x) / s.hidden;
  Gate::Options options;
  options.experts = s.experts, options.hidden = s.hidden, options.k = s.k, options.groups = s.groups;
  options.topk_groups = s.topk_groups, options.scale = 16, options.normalise = s.normalise;
  options.rows_max = rows, options.path = path;
  auto gate = Gate::Create(options);
  EXPECT_TRUE(gate.ok()) << gate.status();
  const auto x_device = ToDevice(x, *stream), w_device = ToDevice(w, *stream);
  const auto used_device = ToDevice(std::vector<int32_t>{used}, *stream);
  const auto experts = Poisoned(rows * s.k * 4, *stream), weights = Poisoned(rows * s.k * 4, *stream);
  const auto status = Poisoned(rows, *stream), logits = Poisoned(rows * s.experts * 4, *stream);
  GateArgs args = {.x = x_device.as<bf16>(),
                   .w = w_device.as<bf16>(),
                   .rows = rows,
                   .rows_used = used < 0 ? nullptr : used_device.as<int32_t>(),
                   .experts = experts.as<int32_t>(),
                   .weights = weights.as<float>(),
                   .status = status.as<uint8_t>(),
                   .logits = logits.as<float>()};
  // Twice: the second finds the counters as the first left them.
  for (int i = 0; i < 2; ++i) {
    const absl::Status ran = gate->Run(args, *stream);
    EXPECT_TRUE(ran.ok()) << ran;
  }
  return {ToHost<int32_t>(experts, *stream), ToHost<float>(weights, *stream), ToHost<float>(logits, *stream),
          ToHost<uint8_t>(status, *stream)};
}

// What RouteToken makes of the same logits, exactly.
void ExpectRouted(const Shape& s, const Result& got, int64_t row) {
  std::vector<float> scratch(s.experts), weights(s.k);
  std::vector<uint16_t> experts(s.k);
  const auto routed = kernels::RouteToken(ConfigOf(s), &got.logits[row * s.experts], scratch.data(),
                                          experts.data(), weights.data());
  ASSERT_TRUE(routed.ok()) << routed;
  ASSERT_EQ(got.status[row], 0) << "row " << row;
  for (int i = 0; i < s.k; ++i) {
    ASSERT_EQ(got.experts[row * s.k + i], experts[i]) << "row " << row << ", choice " << i;
    ASSERT_NEAR(got.weights[row * s.k + i], weights[i], 2e-5f * std::abs(weights[i])) << "row " << row;
  }
}

class GateTest : public testing::TestWithParam<Path> {};

TEST_P(GateTest, NonFiniteRowsAreRejectedAndDisturbNobody) {
  const Shape s = {160, 256, 6, 8, 3};
  std::mt19937 rng(1);
  for (const int rows : {5, 300}) {
    auto x = RandomBF16(rng, rows * s.hidden);
    const auto w = RandomBF16(rng, s.experts * s.hidden, 0.25f);
    x[1 * s.hidden + 3] = 0x7fc0;             // NaN
    x[(rows - 1) * s.hidden + 200] = 0x7f80;  // infinity
    const Result got = Route(s, x, w, GetParam());
    for (const int row : {1, rows - 1}) {
      EXPECT_EQ(got.status[row], static_cast<uint8_t>(GateStatus::kRejected));
      for (int i = row * s.k; i < (row + 1) * s.k; ++i) {
        EXPECT_EQ(got.experts[i], -1);
        EXPECT_EQ(got.weights[i], 0);
      }
    }
    for (int row = 0; row < rows - 1; ++row) {
      if (row != 1) ExpectRouted(s, got, row);
    }
  }
}

TEST_P(GateTest, PaddingChoosesNothing) {
  const Shape s = {64, 2048, 6, 1, 1};
  std::mt19937 rng(2);
  const auto x = RandomBF16(rng, 32 * s.hidden), w = RandomBF16(rng, s.experts * s.hidden, 0.1f);
  const Result got = Route(s, x, w, GetParam(), 20);
  for (int row = 0; row < 20; ++row) ExpectRouted(s, got, row);
  for (int row = 20; row < 32; ++row) {
    EXPECT_EQ(got.status[row], static_cast<uint8_t>(GateStatus::kPadding));
    for (int i = 0; i < s.k; ++i) EXPECT_EQ(got.experts[row * s.k + i], -1);
  }
}

TEST_P(GateTest, TiesKeepTheLowerIndex) {
  const Shape s = {160, 64, 6, 8, 3};
  std::mt19937 rng(3);
  const auto x = RandomBF16(rng, 40 * s.hidden);
  // Experts in equal pairs, and whole groups equal.
  auto w = RandomBF16(rng, s.experts * s.hidden);
  for (int e = 1; e < s.experts; e += 2) std::copy_n(&w[(e - 1) * s.hidden], s.hidden, &w[e * s.hidden]);
  std::copy_n(&w[0], 20 * s.hidden, &w[60 * s.hidden]);
  const Result got = Route(s, x, w, GetParam());
  for (int row = 0; row < 40; ++row) ExpectRouted(s, got, row);
  // All logits equal.
  const Result zeros = Route(s, std::vector<bf16>(3 * s.hidden, 0), w, GetParam());
  for (int i = 0; i < s.k; ++i) EXPECT_EQ(zeros.experts[i], i);
}

TEST_P(GateTest, MatchesFloat64) {
  std::mt19937 rng(4);
  const std::vector<std::pair<Shape, std::vector<int>>> cases = {
      {{160, 5120, 6, 8, 3}, {1, 2, 16, 17, 64, 128, 129, 1000, 2100}},
      {{64, 2048, 6, 1, 1}, {1, 33, 128, 512, 4096}},
      {{64, 512, 12, 4, 2}, {1, 100, 300}},
      {{160, 192, 6, 8, 3}, {1, 50, 333}},
      {{256, 1024, 8, 8, 4, true}, {1, 70, 500, 2500}},
      {{8, 72, 2, 1, 1, true}, {1, 3, 200}},
      {{5, 8, 5, 1, 1}, {2}},
      {{36, 136, 1, 4, 2}, {9}},
  };
  for (const auto& [s, all_rows] : cases) {
    const auto w = RandomBF16(rng, s.experts * s.hidden, 3 / std::sqrt(static_cast<float>(s.hidden)));
    for (const int rows : all_rows) {
      SCOPED_TRACE(testing::Message()
                   << s.experts << " experts, hidden " << s.hidden << ", " << rows << " rows");
      const auto x = RandomBF16(rng, rows * s.hidden);
      const Result got = Route(s, x, w, GetParam());
      std::vector<double> error(rows * s.experts);
      ParallelFor(rows * s.experts, [&](int64_t at) {
        double sum = 0;
        for (int i = 0; i < s.hidden; ++i) {
          sum += double{BF16ToF32(x[at / s.experts * s.hidden + i])} *
                 BF16ToF32(w[at % s.experts * s.hidden + i]);
        }
        error[at] = std::abs(sum - got.logits[at]);
      });
      double worst = 0;
      for (const double e : error) worst = e <= worst ? worst : e;
      EXPECT_LE(worst, 2e-4);  // logits of deviation 3
      for (int row = 0; row < rows && !HasFatalFailure(); ++row) ExpectRouted(s, got, row);
    }
  }
}

TEST(Gate, ShapesOutsideItsLimitsAreRefused) {
  for (const Shape s :
       {Shape{300, 64, 6, 1, 1}, Shape{160, 60, 6, 8, 3}, Shape{160, 64, 6, 7, 3}, Shape{8, 64, 9, 1, 1}}) {
    Gate::Options options;
    options.experts = s.experts, options.hidden = s.hidden, options.k = s.k, options.groups = s.groups;
    options.topk_groups = s.topk_groups;
    EXPECT_EQ(Gate::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

INSTANTIATE_TEST_SUITE_P(Paths, GateTest, testing::Values(Path::kPortable, Path::kAuto));

}  // namespace
}  // namespace minke::cuda
