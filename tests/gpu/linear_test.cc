#include "libs/kernels/cuda/linear.h"

#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

void ExpectNear(const std::vector<double>& got, const std::vector<double>& want, double limit,
                const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i)
    error += std::pow(got[i] - want[i], 2), norm += std::pow(want[i], 2);
  EXPECT_LE(std::sqrt(error / norm), limit) << what;  // NaN fails too
}

TEST(Linear, NoRowsDoNothing) {
  auto stream = Stream::Create();
  auto linear = Linear::Create();
  ASSERT_TRUE(stream.ok() && linear.ok());
  EXPECT_TRUE(linear->Run(LinearArgs{.n = 8, .k = 8}, *stream).ok());
  EXPECT_TRUE(linear->Run(HeadLinearArgs{.n = 8, .k = 8, .heads = 2}, *stream).ok());
}

TEST(Linear, MatchesFloat64) {
  auto stream = Stream::Create();
  auto linear = Linear::Create();
  ASSERT_TRUE(stream.ok() && linear.ok()) << linear.status();
  std::mt19937 rng(1);
  for (const auto [rows, n, k] : std::vector<std::array<int64_t, 3>>{
           {1, 8, 8}, {1, 576, 512}, {3, 40, 24}, {7, 1024, 192}, {64, 264, 96}, {130, 520, 1000}}) {
    const int64_t x_row = k + 16, y_row = n + 8;
    const auto x = RandomBF16(rng, rows * x_row), w = RandomBF16(rng, n * k);
    std::vector<double> want(rows * n);
    ParallelFor(rows * n, [&](int64_t at) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += double{BF16ToF32(x[at / n * x_row + i])} * BF16ToF32(w[at % n * k + i]);
      }
      want[at] = sum;
    });
    const auto x_device = ToDevice(x, *stream), w_device = ToDevice(w, *stream);
    LinearArgs args = {.x = x_device.as<bf16>(),
                       .x_row = x_row,
                       .w = w_device.as<bf16>(),
                       .y_row = y_row,
                       .rows = rows,
                       .n = n,
                       .k = k};
    const auto columns = [&](const auto& all, auto widen) {
      std::vector<double> values;
      for (int64_t i = 0; i < rows * n; ++i) values.push_back(widen(all[i / n * y_row + i % n]));
      return values;
    };
    const std::string what = testing::PrintToString(std::array{rows, n, k});
    const auto same = [](float v) { return double{v}; };
    const auto y16 = Poisoned(rows * y_row * 2, *stream);
    args.y = y16.as();
    ASSERT_TRUE(linear->Run(args, *stream).ok());
    ExpectNear(columns(ToHost<bf16>(y16, *stream), [](bf16 v) { return double{BF16ToF32(v)}; }), want, 3e-3,
               what);
    const auto y32 = Poisoned(rows * y_row * 4, *stream);
    args.y = y32.as();
    args.output = LinearOutput::kF32;
    ASSERT_TRUE(linear->Run(args, *stream).ok());
    ExpectNear(columns(ToHost<float>(y32, *stream), same), want, 1e-5, what);
    args.output = LinearOutput::kAddF32;
    ASSERT_TRUE(linear->Run(args, *stream).ok());
    for (double& v : want) v *= 2;
    ExpectNear(columns(ToHost<float>(y32, *stream), same), want, 1e-5, what + " added");
  }
}

// W_UK multiplied into queries, W_UV into what attention gives: the strides of the model.
TEST(Linear, HeadsMatchFloat64) {
  auto stream = Stream::Create();
  auto linear = Linear::Create();
  ASSERT_TRUE(stream.ok() && linear.ok());
  std::mt19937 rng(2);
  for (const auto [rows, heads, nope, v, rank, rope] : std::vector<std::array<int64_t, 6>>{
           {1, 8, 32, 32, 64, 16}, {3, 16, 128, 128, 512, 64}, {33, 4, 16, 24, 32, 16}}) {
    const int64_t head_rows = nope + v, latent = rank + rope;
    const auto w = RandomBF16(rng, heads * head_rows * rank),
               q = RandomBF16(rng, rows * heads * (nope + rope));
    const auto w_device = ToDevice(w, *stream), q_device = ToDevice(q, *stream);
    const auto y = Poisoned(rows * heads * latent * 2, *stream);
    HeadLinearArgs absorb = {.x = q_device.as<bf16>(),
                             .x_row = heads * (nope + rope),
                             .x_head = nope + rope,
                             .w = w_device.as<bf16>(),
                             .w_head = head_rows * rank,
                             .w_is_kn = true,
                             .y = y.as<bf16>(),
                             .y_row = heads * latent,
                             .y_head = latent,
                             .rows = rows,
                             .n = rank,
                             .k = nope,
                             .heads = heads};
    ASSERT_TRUE(linear->Run(absorb, *stream).ok());
    const auto got = ToHost<bf16>(y, *stream);
    std::vector<double> want(rows * heads * rank), have(want.size());
    ParallelFor(rows * heads, [&](int64_t at) {
      for (int64_t r = 0; r < rank; ++r) {
        double sum = 0;
        for (int64_t d = 0; d < nope; ++d) {
          sum += double{BF16ToF32(q[at * (nope + rope) + d])} *
                 BF16ToF32(w[(at % heads * head_rows + d) * rank + r]);
        }
        want[at * rank + r] = sum;
        have[at * rank + r] = BF16ToF32(got[at * latent + r]);
      }
      for (int64_t r = rank; r < latent; ++r)
        EXPECT_EQ(got[at * latent + r], 0xffff) << "the rotary part was written";
    });
    ExpectNear(have, want, 3e-3, "absorb");

    const auto o = RandomBF16(rng, rows * heads * rank);
    const auto o_device = ToDevice(o, *stream);
    const auto out = Poisoned(rows * heads * v * 2, *stream);
    HeadLinearArgs expand = {.x = o_device.as<bf16>(),
                             .x_row = heads * rank,
                             .x_head = rank,
                             .w = w_device.as<bf16>() + nope * rank,
                             .w_head = head_rows * rank,
                             .y = out.as<bf16>(),
                             .y_row = heads * v,
                             .y_head = v,
                             .rows = rows,
                             .n = v,
                             .k = rank,
                             .heads = heads};
    ASSERT_TRUE(linear->Run(expand, *stream).ok());
    std::vector<double> want_out(rows * heads * v);
    ParallelFor(rows * heads, [&](int64_t at) {
      for (int64_t d = 0; d < v; ++d) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) {
          sum += double{BF16ToF32(o[at * rank + r])} *
                 BF16ToF32(w[(at % heads * head_rows + nope + d) * rank + r]);
        }
        want_out[at * v + d] = sum;
      }
    });
    ExpectClose(ToHost<bf16>(out, *stream), want_out, v, 3e-3, 2e-2, "expand");
  }
}

}  // namespace
}  // namespace minke::cuda
