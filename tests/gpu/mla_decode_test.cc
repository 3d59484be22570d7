#include "libs/kernels/cuda/mla_decode.h"

#include <algorithm>

#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

constexpr float kScale = 0.1147213868f;

struct Case {
  const char* name;
  int heads;
  std::vector<DecodeSequence> sequences;
};

struct Form {
  Path path;
  int variant;
};

class MlaDecodeTest : public testing::TestWithParam<Form> {
 protected:
  void SetUp() override {
    if (GetParam().path == Path::kHopper && !CurrentDevice()->hopper()) GTEST_SKIP() << "no sm_90 device";
  }
};

// A batch with its pages scattered over the cache, NaN in every slot that no token fills.
void RunCase(const Case& c, const Form& form, uint32_t seed, int repeats = 0) {
  SCOPED_TRACE(testing::Message() << c.name << ", " << c.heads << " heads, path "
                                  << static_cast<int>(form.path) << ", variant " << form.variant);
  std::mt19937 rng(seed);
  auto stream = Stream::Create();
  ASSERT_TRUE(stream.ok()) << stream.status();
  int64_t tokens = 0, pages = 0, stride = 1;
  for (const auto& s : c.sequences) {
    tokens += s.queries;
    pages += (s.length + 63) / 64;
    stride = std::max<int64_t>(stride, (s.length + 63) / 64);
  }
  const int64_t cache_pages = pages + 7;
  std::vector<uint32_t> order(cache_pages);
  for (int64_t i = 0; i < cache_pages; ++i) order[i] = static_cast<uint32_t>(i);
  std::shuffle(order.begin(), order.end(), rng);
  std::vector<uint32_t> table(c.sequences.size() * stride, 0);
  std::vector<bf16> cache(cache_pages * 64 * kLatentDim, 0x7fff);
  std::normal_distribution<float> normal;
  int64_t page = 0;
  for (size_t s = 0; s < c.sequences.size(); ++s) {
    for (int64_t t = 0; t * 64 < c.sequences[s].length; ++t) {
      const uint32_t at = table[s * stride + t] = order[page++];
      const int64_t filled = std::min<int64_t>(64, c.sequences[s].length - t * 64);
      for (int64_t i = 0; i < filled * kLatentDim; ++i)
        cache[at * 64 * kLatentDim + i] = F32ToBF16(normal(rng));
    }
  }
  const auto q = RandomBF16(rng, tokens * c.heads * kLatentDim, 0.7f);

  // float64: every query row by itself.
  std::vector<double> want(tokens * c.heads * kLatentRank), want_lse(tokens * c.heads);
  std::vector<std::pair<int, int>> sequence_of;  // token -> sequence, tokens it sees
  for (size_t s = 0; s < c.sequences.size(); ++s) {
    for (int i = 0; i < c.sequences[s].queries; ++i) {
      sequence_of.emplace_back(s, c.sequences[s].length - c.sequences[s].queries + 1 + i);
    }
  }
  ParallelFor(tokens * c.heads, [&](int64_t row) {
    const auto [s, seen] = sequence_of[row / c.heads];
    std::vector<double> score(seen);
    const auto latent = [&](int j) {
      return &cache[(int64_t{table[s * stride + j / 64]} * 64 + j % 64) * kLatentDim];
    };
    double max = -INFINITY, total = 0;
    for (int j = 0; j < seen; ++j) {
      double sum = 0;
      const bf16* key = latent(j);
      for (int d = 0; d < kLatentDim; ++d)
        sum += double{BF16ToF32(q[row * kLatentDim + d])} * BF16ToF32(key[d]);
      score[j] = sum * kScale;
      max = std::max(max, score[j]);
    }
    for (double& x : score) total += x = std::exp(x - max);
    double* out = &want[row * kLatentRank];
    for (int j = 0; j < seen; ++j) {
      const bf16* value = latent(j);
      const double weight = score[j] / total;
      for (int d = 0; d < kLatentRank; ++d) out[d] += weight * BF16ToF32(value[d]);
    }
    want_lse[row] = max + std::log(total);
  });

  MlaDecode::Options options;
  options.heads = c.heads;
  options.softmax_scale = kScale;
  options.sequences_max = static_cast<int32_t>(c.sequences.size());
  options.path = form.path;
  options.variant = form.variant;
  auto decode = MlaDecode::Create(options);
  ASSERT_TRUE(decode.ok()) << decode.status();
  const absl::Status planned = decode->Plan(c.sequences, *stream);
  ASSERT_TRUE(planned.ok()) << planned;
  const DeviceBuffer q_device = ToDevice(q, *stream), cache_device = ToDevice(cache, *stream),
                     table_device = ToDevice(table, *stream);
  const DeviceBuffer lse = Poisoned(std::ssize(want_lse) * 4, *stream);
  const auto run = [&] {
    const DeviceBuffer out = Poisoned(std::ssize(want) * 2, *stream);
    MlaDecodeArgs args;
    args.q = q_device.as<bf16>();
    args.cache = cache_device.as<bf16>();
    args.cache_pages = cache_pages;
    args.page_table = table_device.as<uint32_t>();
    args.page_table_stride = stride;
    args.out = out.as<bf16>();
    args.lse = lse.as<float>();
    const absl::Status status = decode->Run(args, *stream);
    EXPECT_TRUE(status.ok()) << status;
    return ToHost<bf16>(out, *stream);
  };
  const auto got = run();
  const auto got_lse = ToHost<float>(lse, *stream);
  if (testing::Test::HasFailure()) return;
  ExpectClose(got, want, kLatentRank, 6e-3, 1.5e-2, c.name);
  double worst = 0;
  for (size_t i = 0; i < got_lse.size(); ++i) {
    const double error = std::abs(got_lse[i] - want_lse[i]);
    if (!(error <= worst)) worst = error;
  }
  EXPECT_LE(worst, 1e-3) << "lse";
  // A plan fixes every order of addition: whatever differs from run to run is a race.
  for (int i = 0; i < repeats && !testing::Test::HasFailure(); ++i) {
    ExpectSameBits(run(), got, kLatentRank, "repeat " + std::to_string(i));
  }
}

TEST_P(MlaDecodeTest, LengthsAroundAPage) {
  for (const int heads : {16, 128}) {
    for (const int length : {1, 2, 63, 64, 65, 127, 128, 129, 200}) {
      RunCase({"one sequence", heads, {{length, 1}}}, GetParam(), length);
      if (HasFailure()) return;
    }
  }
}

TEST_P(MlaDecodeTest, SeveralQueriesAreCausalAmongThemselves) {
  for (const int heads : {16, 32, 48, 64, 128}) {
    for (const int queries : {2, 3, 4}) {
      RunCase({"queries",
               heads,
               {{queries, queries}, {64, queries}, {65, queries}, {66, queries}, {300, queries}}},
              GetParam(), heads + queries);
      if (HasFailure()) return;
    }
  }
}

TEST_P(MlaDecodeTest, RaggedBatches) {
  std::mt19937 rng(5);
  for (const int heads : {16, 64, 112, 128}) {
    Case c = {"ragged", heads, {}};
    for (int i = 0; i < 24; ++i) {
      const int queries = 1 + static_cast<int>(rng() % 4);
      c.sequences.push_back({queries + static_cast<int>(rng() % (i % 6 == 0 ? 2500 : 200)), queries});
    }
    RunCase(c, GetParam(), heads, 20);
    if (HasFailure()) return;
  }
}

TEST_P(MlaDecodeTest, OneLongSequenceIsCutForEveryWorker) {
  for (const int heads : {16, 128}) {
    RunCase({"long", heads, {{20011, 1}}}, GetParam(), heads);
    if (HasFailure()) return;
  }
}

// Many equal sequences: several segments per worker, some of one page, and the same bits every time.
TEST_P(MlaDecodeTest, ManySequences) {
  for (const int heads : {16, 128}) {
    Case c = {"many", heads, std::vector<DecodeSequence>(heads == 16 ? 300 : 140, {450, 1})};
    RunCase(c, GetParam(), heads, 100);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Portable, MlaDecodeTest, testing::Values(Form{Path::kPortable, 0}));
INSTANTIATE_TEST_SUITE_P(Hopper, MlaDecodeTest,
                         testing::Values(Form{Path::kHopper, 0}, Form{Path::kHopper, 1}));

}  // namespace
}  // namespace minke::cuda
