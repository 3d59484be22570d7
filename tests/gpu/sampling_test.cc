#include "libs/kernels/cuda/sampling.h"

#include "services/attention/sampling/sampler.h"
#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

std::vector<uint32_t> OnDevice(const std::vector<float>& logits, const std::vector<SampleRow>& rows,
                               const std::vector<uint8_t>& allowed) {
  auto stream = Stream::Create();
  const auto logits_device = ToDevice(logits, *stream);
  const auto rows_device = ToDevice(rows, *stream);
  const auto allowed_device = ToDevice(allowed, *stream);
  const auto tokens = Poisoned(std::ssize(rows) * 4, *stream);
  const absl::Status ran = SampleTokens({.logits = logits_device.as<float>(),
                                         .params = rows_device.as<SampleRow>(),
                                         .allowed = allowed.empty() ? nullptr : allowed_device.as<uint8_t>(),
                                         .tokens = tokens.as<uint32_t>(),
                                         .rows = std::ssize(rows),
                                         .vocab = std::ssize(logits) / std::ssize(rows)},
                                        *stream);
  EXPECT_TRUE(ran.ok()) << ran;
  return ToHost<uint32_t>(tokens, *stream);
}

uint32_t OnHost(std::vector<float> logits, const SampleRow& row, const std::vector<uint8_t>& allowed) {
  attention::SamplingParams params;
  params.temperature = row.temperature, params.top_p = row.top_p, params.min_p = row.min_p;
  params.top_k = row.top_k, params.seed = row.seed;
  return attention::Sample(params, {}, allowed, row.position, logits);
}

TEST(Sampling, GreedyTakesTheLowestOfEqualIds) {
  std::vector<float> logits(3 * 1000, -2);
  logits[17] = logits[900] = 5;
  logits[1000 + 0] = 1, logits[1000 + 999] = 1.5f;
  logits[2000 + 3] = -0.f, logits[2000 + 7] = 0.f;
  EXPECT_EQ(OnDevice(logits, std::vector<SampleRow>(3), {}), (std::vector<uint32_t>{17, 999, 3}));
  std::vector<uint8_t> allowed(1000, 1);
  allowed[17] = allowed[999] = allowed[3] = 0;
  EXPECT_EQ(OnDevice(logits, std::vector<SampleRow>(3), allowed), (std::vector<uint32_t>{900, 0, 7}));
}

TEST(Sampling, RowsWithNanHaveNoToken) {
  std::vector<float> logits(2 * 3000, 1);
  logits[2999] = NAN;
  std::vector<SampleRow> rows(2);
  rows[0].temperature = rows[1].temperature = 1;
  EXPECT_EQ(OnDevice(logits, rows, {})[0], kNoToken);
  EXPECT_LT(OnDevice(logits, rows, {})[1], 3000u);
}

// The host's exp and the device's differ in the last place: where the draw falls next to a boundary, the
// neighbour may be chosen. Less than one in a thousand.
TEST(Sampling, DrawsAreTheHosts) {
  std::mt19937 rng(5);
  int different = 0, total = 0;
  for (const int vocab : {1, 7, 1000, 102400}) {
    const int rows = vocab > 10000 ? 60 : 200;
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> logits(rows * vocab);
    for (float& v : logits) v = normal(rng);
    for (int r = 0; r < rows; r += 5) {  // equal logits: order among them is by id
      for (int i = 0; i < vocab; ++i) logits[r * vocab + i] = std::round(logits[r * vocab + i]);
    }
    std::vector<SampleRow> params(rows);
    for (int r = 0; r < rows; ++r) {
      SampleRow& p = params[r];
      p.seed = rng(), p.position = rng() % 5000;
      p.temperature = std::array{0.f, 0.3f, 1.f, 2.f}[r % 4];
      p.top_p = std::array{1.f, 0.95f, 0.5f, 1e-6f, 0.9999f}[r / 4 % 5];
      p.top_k = std::array{0u, 1u, 50u, 1000000u}[r / 3 % 4];
      p.min_p = r % 7 == 3 ? 0.05f : 0;
    }
    std::vector<uint8_t> allowed(vocab, 1);
    for (int i = 1; i < vocab; i += 3) allowed[i] = 0;
    for (const auto& mask : {std::vector<uint8_t>(), allowed}) {
      const auto got = OnDevice(logits, params, mask);
      for (int r = 0; r < rows; ++r, ++total) {
        const auto begin = logits.begin() + int64_t{r} * vocab;
        different += got[r] != OnHost({begin, begin + vocab}, params[r], mask);
      }
    }
  }
  EXPECT_LE(different, total / 500) << "of " << total;
}

}  // namespace
}  // namespace minke::cuda
