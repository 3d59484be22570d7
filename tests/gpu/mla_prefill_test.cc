#include "libs/kernels/cuda/mla_prefill.h"

#include <algorithm>

#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

constexpr float kScale = 0.1147213868f;

struct Form {
  Path path;
  int variant;
};

class MlaPrefillTest : public testing::TestWithParam<Form> {
 protected:
  void SetUp() override {
    if (GetParam().path == Path::kHopper && !CurrentDevice()->hopper()) GTEST_SKIP() << "no sm_90 device";
  }
};

// How keys and values lie in memory.
enum class Layout { kWideKeys, kSharedRope, kInterleaved };

void RunCase(int heads, const std::vector<PrefillSequence>& sequences, Layout layout, const Form& form,
             uint32_t seed, int repeats = 0) {
  SCOPED_TRACE(testing::Message() << heads << " heads, " << sequences.size() << " sequences, first "
                                  << sequences[0].queries << "/" << sequences[0].keys << ", layout "
                                  << static_cast<int>(layout) << ", path " << static_cast<int>(form.path)
                                  << ", variant " << form.variant);
  std::mt19937 rng(seed);
  auto stream = Stream::Create();
  ASSERT_TRUE(stream.ok()) << stream.status();
  int64_t queries = 0, keys = 0;
  for (const auto& s : sequences) queries += s.queries, keys += s.keys;
  const auto q = RandomBF16(rng, queries * heads * 192, 0.7f);
  // One allocation each for what the engine would have: rows beyond the last key are NaN.
  const int64_t wide = layout == Layout::kInterleaved ? 256 : layout == Layout::kWideKeys ? 192 : 128;
  auto k = RandomBF16(rng, keys * heads * wide);
  auto rope = RandomBF16(rng, keys * 64);
  auto v = RandomBF16(rng, keys * heads * 128);
  const auto nope_at = [&](int64_t row, int h) { return &k[(row * heads + h) * wide]; };
  const auto rope_at = [&](int64_t row, int h) {
    return layout == Layout::kWideKeys ? nope_at(row, h) + 128 : &rope[row * 64];
  };
  const auto value_at = [&](int64_t row, int h) {
    return layout == Layout::kInterleaved ? nope_at(row, h) + 128 : &v[(row * heads + h) * 128];
  };

  std::vector<double> want(queries * heads * 128), want_lse(queries * heads);
  struct RowOf {
    int64_t key_begin;
    int seen;
  };
  std::vector<RowOf> row_of;
  int64_t key_begin = 0;
  for (const auto& s : sequences) {
    for (int i = 0; i < s.queries; ++i) row_of.push_back({key_begin, s.keys - s.queries + i + 1});
    key_begin += s.keys;
  }
  ParallelFor(queries * heads, [&](int64_t at) {
    const RowOf row = row_of[at / heads];
    const int h = static_cast<int>(at % heads);
    std::vector<double> score(row.seen);
    std::vector<float> query(192);
    for (int d = 0; d < 192; ++d) query[d] = BF16ToF32(q[at * 192 + d]);
    double max = -INFINITY, total = 0;
    for (int j = 0; j < row.seen; ++j) {
      double sum = 0;
      const bf16* nope = nope_at(row.key_begin + j, h);
      const bf16* rotated = rope_at(row.key_begin + j, h);
      for (int d = 0; d < 128; ++d) sum += double{query[d]} * BF16ToF32(nope[d]);
      for (int d = 0; d < 64; ++d) sum += double{query[128 + d]} * BF16ToF32(rotated[d]);
      score[j] = sum * kScale;
      max = std::max(max, score[j]);
    }
    for (double& x : score) total += x = std::exp(x - max);
    for (int j = 0; j < row.seen; ++j) {
      const bf16* value = value_at(row.key_begin + j, h);
      for (int d = 0; d < 128; ++d) want[at * 128 + d] += score[j] / total * BF16ToF32(value[d]);
    }
    want_lse[at] = max + std::log(total);
  });

  MlaPrefill::Options options;
  options.heads = heads;
  options.softmax_scale = kScale;
  options.sequences_max = static_cast<int32_t>(sequences.size());
  options.path = form.path;
  options.variant = form.variant;
  auto prefill = MlaPrefill::Create(options);
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  const absl::Status planned = prefill->Plan(sequences, *stream);
  ASSERT_TRUE(planned.ok()) << planned;
  const DeviceBuffer q_device = ToDevice(q, *stream), k_device = ToDevice(k, *stream),
                     rope_device = ToDevice(rope, *stream), v_device = ToDevice(v, *stream);
  MlaPrefillArgs args;
  args.q = q_device.as<bf16>();
  args.k = {k_device.as<bf16>(), heads * wide, wide};
  args.k_rope = layout == Layout::kWideKeys ? HeadRows{k_device.as<bf16>() + 128, heads * wide, wide}
                                            : HeadRows{rope_device.as<bf16>(), 64, 0};
  args.v = layout == Layout::kInterleaved ? HeadRows{k_device.as<bf16>() + 128, heads * wide, wide}
                                          : HeadRows{v_device.as<bf16>(), heads * 128, 128};
  const DeviceBuffer lse = Poisoned(std::ssize(want_lse) * 4, *stream);
  args.lse = lse.as<float>();
  const auto run = [&] {
    const DeviceBuffer out = Poisoned(std::ssize(want) * 2, *stream);
    args.out = out.as<bf16>();
    const absl::Status status = prefill->Run(args, *stream);
    EXPECT_TRUE(status.ok()) << status;
    return ToHost<bf16>(out, *stream);
  };
  const auto got = run();
  const auto got_lse = ToHost<float>(lse, *stream);
  if (testing::Test::HasFailure()) return;
  ExpectClose(got, want, 128, 6e-3, 1.5e-2, "prefill");
  double worst = 0;
  for (size_t i = 0; i < got_lse.size(); ++i) {
    const double error = std::abs(got_lse[i] - want_lse[i]);
    if (!(error <= worst)) worst = error;
  }
  EXPECT_LE(worst, 1e-3) << "lse";
  for (int i = 0; i < repeats && !testing::Test::HasFailure(); ++i) {
    ExpectSameBits(run(), got, 128, "repeat " + std::to_string(i));
  }
}

TEST_P(MlaPrefillTest, LengthsAroundATile) {
  for (const int length : {1, 2, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 400}) {
    RunCase(3, {{length, length}}, Layout::kWideKeys, GetParam(), length);
    if (HasFailure()) return;
  }
}

TEST_P(MlaPrefillTest, ChunksAttendToTheirPrefix) {
  for (const auto& [queries, keys] : {std::pair{1, 2},
                                      {1, 128},
                                      {1, 129},
                                      {64, 128},
                                      {64, 200},
                                      {100, 163},
                                      {130, 333},
                                      {128, 640},
                                      {7, 1000}}) {
    RunCase(2, {{queries, keys}}, Layout::kSharedRope, GetParam(), keys);
    if (HasFailure()) return;
  }
}

TEST_P(MlaPrefillTest, RaggedBatchesInAnyLayout) {
  std::mt19937 rng(7);
  for (const Layout layout : {Layout::kWideKeys, Layout::kSharedRope, Layout::kInterleaved}) {
    std::vector<PrefillSequence> sequences;
    for (int i = 0; i < 9; ++i) {
      const int queries = static_cast<int>(rng() % (i % 3 == 0 ? 500 : 90));
      sequences.push_back({queries, queries + (i % 2 == 0 ? static_cast<int>(rng() % 300) : 0)});
    }
    RunCase(16, sequences, layout, GetParam(), 11, 10);
    if (HasFailure()) return;
  }
}

TEST_P(MlaPrefillTest, ManyTilesPerBlock) {
  RunCase(128, {{700, 700}, {300, 900}}, Layout::kInterleaved, GetParam(), 13, 30);
}

// A NaN in one sequence's keys and values stays in that sequence.
TEST_P(MlaPrefillTest, SequencesDoNotTouch) {
  auto stream = Stream::Create();
  ASSERT_TRUE(stream.ok());
  std::mt19937 rng(17);
  const int heads = 2, first = 70, second = 90;
  const auto q = RandomBF16(rng, (first + second) * heads * 192);
  auto k = RandomBF16(rng, (first + second) * heads * 192),
       v = RandomBF16(rng, (first + second) * heads * 128);
  std::fill(k.begin() + first * heads * 192, k.end(), bf16{0x7fff});
  std::fill(v.begin() + first * heads * 128, v.end(), bf16{0x7fff});
  MlaPrefill::Options options;
  options.heads = heads;
  options.softmax_scale = kScale;
  options.path = GetParam().path;
  options.variant = GetParam().variant;
  auto prefill = MlaPrefill::Create(options);
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  const PrefillSequence sequences[] = {{first, first}, {second, second}};
  ASSERT_TRUE(prefill->Plan(sequences, *stream).ok());
  const DeviceBuffer q_device = ToDevice(q, *stream), k_device = ToDevice(k, *stream),
                     v_device = ToDevice(v, *stream),
                     out = Poisoned((first + second) * heads * 128 * 2, *stream);
  MlaPrefillArgs args;
  args.q = q_device.as<bf16>();
  args.k = {k_device.as<bf16>(), heads * 192, 192};
  args.k_rope = {k_device.as<bf16>() + 128, heads * 192, 192};
  args.v = {v_device.as<bf16>(), heads * 128, 128};
  args.out = out.as<bf16>();
  ASSERT_TRUE(prefill->Run(args, *stream).ok());
  const auto got = ToHost<bf16>(out, *stream);
  for (int i = 0; i < first * heads * 128; ++i) ASSERT_TRUE(std::isfinite(BF16ToF32(got[i]))) << i;
}

INSTANTIATE_TEST_SUITE_P(Portable, MlaPrefillTest, testing::Values(Form{Path::kPortable, 0}));
INSTANTIATE_TEST_SUITE_P(Hopper, MlaPrefillTest,
                         testing::Values(Form{Path::kHopper, 0}, Form{Path::kHopper, 1}));

}  // namespace
}  // namespace minke::cuda
