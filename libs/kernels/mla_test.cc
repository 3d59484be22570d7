#include "libs/kernels/cpu/mla.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/kernels/reference/reference.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"

namespace minke::kernels {
namespace {

std::vector<double> ReadWide(const Checkpoint& checkpoint, const std::string& name) {
  const TensorView& view = checkpoint.tensors().at(name);
  std::vector<float> values(view.elements());
  view.Read(0, values);
  return {values.begin(), values.end()};
}

// A cache of random latents for one sequence whose pages lie scattered.
struct RandomCache {
  RandomCache(std::mt19937& rng, Precision precision, int64_t keys, int64_t latent_dim) {
    const int64_t page_count = (keys + kPageTokens - 1) / kPageTokens;
    for (int64_t i = 0; i < page_count; ++i)
      pages.push_back(static_cast<uint32_t>((i * 7 + 3) % (2 * page_count + 8)));
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    while (std::ssize(pages) < page_count) pages.push_back(pages.back() + 1);
    std::shuffle(pages.begin(), pages.end(), rng);
    const uint32_t page_end = *std::max_element(pages.begin(), pages.end()) + 1;
    bytes.resize(page_end * kPageTokens * latent_dim * ActivationBytes(precision),
                 std::byte{0xff});  // NaN where unwritten
    std::normal_distribution<float> normal;
    latent.resize(keys * latent_dim);
    for (int64_t key = 0; key < keys; ++key) {
      std::vector<float> row(latent_dim);
      for (float& v : row)
        v = precision == Precision::kExact ? normal(rng) : BF16ToF32(F32ToBF16(normal(rng)));
      std::copy(row.begin(), row.end(), latent.begin() + key * latent_dim);
      const int64_t at = (int64_t{pages[key / kPageTokens]} * kPageTokens + key % kPageTokens) * latent_dim;
      ToActivation(precision, row.data(), bytes.data() + at * ActivationBytes(precision), latent_dim);
    }
  }
  std::vector<uint32_t> pages;
  std::vector<std::byte> bytes;
  std::vector<double> latent;
};

struct Widths {
  int heads, nope, rope, v, rank;
};

class MlaForms : public testing::TestWithParam<Widths> {};
INSTANTIATE_TEST_SUITE_P(Widths, MlaForms,
                         testing::Values(Widths{4, 16, 16, 16, 32}, Widths{3, 24, 8, 48, 96},
                                         Widths{6, 96, 16, 24, 48}, Widths{16, 128, 64, 128, 512},
                                         Widths{1, 5, 2, 7, 9}));

TEST_P(MlaForms, BothFormsMatchReferenceForRaggedChunks) {
  const Widths w = GetParam();
  ModelConfig config = testing_support::TinyConfig();
  config.num_attention_heads = w.heads;
  config.qk_nope_head_dim = w.nope;
  config.qk_rope_head_dim = w.rope;
  config.v_head_dim = w.v;
  config.kv_lora_rank = w.rank;
  const MlaShape shape(config);
  std::mt19937 rng(w.heads * 100 + w.nope);
  ThreadPool pool(2);
  testing_support::TempCheckpoint files(testing_support::SingleTensor(
      "kv_b", {shape.heads * (shape.nope_dim + shape.v_dim), shape.kv_lora_rank}, rng, 0.2f));
  const auto kv_b = ReadWide(files.checkpoint(), "kv_b");
  for (const Precision precision : {Precision::kExact, Precision::kBF16}) {
    absl::StatusOr<MlaWeights> weights = MlaWeights::Load(files.checkpoint(), "kv_b", shape, precision, pool);
    ASSERT_TRUE(weights.ok()) << weights.status();
    for (const auto& [rows, keys] :
         {std::pair{1, 1}, {1, 64}, {1, 65}, {5, 5}, {64, 64}, {70, 200}, {3, 300}, {130, 130}}) {
      const RandomCache cache(rng, precision, keys, shape.latent_dim());
      std::normal_distribution<float> normal;
      std::vector<float> q(rows * shape.heads * shape.q_dim());
      for (float& v : q) v = BF16ToF32(F32ToBF16(normal(rng)));
      const auto want = reference::Mla(shape, {q.begin(), q.end()}, cache.latent, kv_b, rows, keys);
      std::vector<float> got[2];
      for (const MlaForm form : {MlaForm::kAbsorbed, MlaForm::kNaive}) {
        const MlaChunk chunk{0, rows, keys - rows, cache.pages, form};
        std::vector<std::byte> out(want.size() * ActivationBytes(precision));
        MlaScratch scratch;
        MlaAttention(shape, *weights, precision, {&chunk, 1}, q.data(), rows, cache.bytes.data(), out.data(),
                     scratch, pool);
        std::vector<float>& values = got[form == MlaForm::kNaive];
        values.resize(want.size());
        FromActivation(precision, out.data(), values.data(), std::ssize(values));
        double error = 0, norm = 0;
        for (size_t i = 0; i < want.size(); ++i) {
          error += (values[i] - want[i]) * (values[i] - want[i]);
          norm += want[i] * want[i];
        }
        EXPECT_LT(std::sqrt(error / norm), precision == Precision::kExact ? 3e-6 : 8e-3)
            << "form " << (form == MlaForm::kNaive ? "naive" : "absorbed") << " rows " << rows << " keys "
            << keys;
      }
    }
  }
}

TEST(MlaForms, AgreeAtLongPositionsAndChunksGiveTheSameBits) {
  ModelConfig config = testing_support::TinyConfig();
  const MlaShape shape(config);
  std::mt19937 rng(9);
  ThreadPool pool(2);
  testing_support::TempCheckpoint files(testing_support::SingleTensor(
      "kv_b", {shape.heads * (shape.nope_dim + shape.v_dim), shape.kv_lora_rank}, rng, 0.2f));
  absl::StatusOr<MlaWeights> weights =
      MlaWeights::Load(files.checkpoint(), "kv_b", shape, Precision::kExact, pool);
  ASSERT_TRUE(weights.ok());
  const int64_t keys = 4200, rows = 333;
  const RandomCache cache(rng, Precision::kExact, keys, shape.latent_dim());
  std::normal_distribution<float> normal;
  std::vector<float> q(rows * shape.heads * shape.q_dim());
  for (float& v : q) v = normal(rng);
  const auto run = [&](MlaForm form, int64_t step) {
    std::vector<float> out(rows * shape.heads * shape.v_dim);
    std::vector<MlaChunk> chunks;
    for (int64_t at = 0; at < rows; at += step) {
      chunks.push_back({at, std::min(step, rows - at), keys - rows + at, cache.pages, form});
    }
    MlaScratch scratch;
    MlaAttention(shape, *weights, Precision::kExact, chunks, q.data(), rows, cache.bytes.data(),
                 reinterpret_cast<std::byte*>(out.data()), scratch, pool);
    return out;
  };
  const auto absorbed = run(MlaForm::kAbsorbed, rows), naive = run(MlaForm::kNaive, rows);
  double error = 0, norm = 0;
  for (size_t i = 0; i < absorbed.size(); ++i) {
    error += (absorbed[i] - naive[i]) * (absorbed[i] - naive[i]);
    norm += naive[i] * naive[i];
  }
  EXPECT_LT(std::sqrt(error / norm), 1e-5);
  for (const int64_t step : {1, 7, 64}) {
    EXPECT_EQ(run(MlaForm::kAbsorbed, step), absorbed) << "chunks of " << step;
    EXPECT_EQ(run(MlaForm::kNaive, step), naive) << "chunks of " << step;
  }
  // A few rows far along: their keys are shared out between the threads, partition by partition.
  const int64_t row_width = shape.heads * shape.v_dim;
  for (const int threads : {1, 2, 8}) {
    ThreadPool other_pool(threads);
    for (const int64_t tail : {1, 2, 4, 5}) {
      // The last rows, and some from the middle, in one batch.
      const MlaChunk chunks[] = {
          {rows - tail, tail, keys - tail, cache.pages, MlaForm::kAbsorbed},
          {100, 3, keys - rows + 100, cache.pages, MlaForm::kAbsorbed},
      };
      std::vector<float> out(rows * row_width);
      MlaScratch scratch;
      MlaAttention(shape, *weights, Precision::kExact, chunks, q.data(), rows, cache.bytes.data(),
                   reinterpret_cast<std::byte*>(out.data()), scratch, other_pool);
      for (const auto& [begin, count] : {std::pair{rows - tail, tail}, {int64_t{100}, int64_t{3}}}) {
        EXPECT_TRUE(std::equal(out.begin() + begin * row_width, out.begin() + (begin + count) * row_width,
                               absorbed.begin() + begin * row_width))
            << threads << " threads, " << tail << " rows";
      }
    }
  }
}

TEST(MlaForms, CheaperFormDependsOnRowsAndOnWhatIsBeforeThem) {
  ModelConfig config = testing_support::TinyConfig();
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  const MlaShape shape(config);
  EXPECT_EQ(CheaperForm(shape, 1, 0), MlaForm::kAbsorbed);
  EXPECT_EQ(CheaperForm(shape, 4, 8192), MlaForm::kAbsorbed);
  EXPECT_EQ(CheaperForm(shape, 128, 0), MlaForm::kNaive);
  // Far behind the prompt's beginning the expansion of all keys pays from about 171 rows on.
  EXPECT_EQ(CheaperForm(shape, 128, 1 << 20), MlaForm::kAbsorbed);
  EXPECT_EQ(CheaperForm(shape, 170, 1 << 20), MlaForm::kAbsorbed);
  EXPECT_EQ(CheaperForm(shape, 172, 1 << 20), MlaForm::kNaive);
  EXPECT_EQ(CheaperForm(shape, 512, 8192), MlaForm::kNaive);
}

TEST(GroupedFfn, MatchesReferenceForAnyDistributionOfRows) {
  std::mt19937 rng(11);
  ThreadPool pool(2);
  for (const auto& [hidden, inner] : {std::pair{64, 24}, {96, 160}, {40, 70}}) {
    std::vector<testing_support::Tensor> tensors;
    for (int e = 0; e < 4; ++e) {
      for (const char* part : {"gate", "up", "down"}) {
        const bool down = std::string_view(part) == "down";
        tensors.push_back(testing_support::SingleTensor(StrCat("e", e, ".", part, "_proj.weight"),
                                                        {down ? hidden : inner, down ? inner : hidden}, rng,
                                                        0.2f)
                              .front());
      }
    }
    testing_support::TempCheckpoint files(tensors);
    for (const Precision precision : {Precision::kExact, Precision::kBF16}) {
      std::vector<FfnWeights> weights;
      for (int e = 0; e < 4; ++e) {
        auto loaded =
            FfnWeights::Load(files.checkpoint(), StrCat("e", e, "."), hidden, inner, precision, pool);
        ASSERT_TRUE(loaded.ok()) << loaded.status();
        weights.push_back(*std::move(loaded));
      }
      for (const std::vector<int>& counts :
           {std::vector<int>{1, 0, 0, 0}, {0, 3, 200, 1}, {6, 6, 6, 6}, {0, 0, 0, 0}}) {
        std::vector<FfnRows> items;
        int64_t rows = 0;
        for (int e = 0; e < 4; ++e) {
          items.push_back({&weights[e], rows, counts[e]});
          rows += counts[e];
        }
        std::normal_distribution<float> normal;
        std::vector<float> x(rows * hidden), y(rows * hidden);
        for (float& v : x) v = BF16ToF32(F32ToBF16(normal(rng)));
        std::vector<std::byte> act(x.size() * ActivationBytes(precision));
        ToActivation(precision, x.data(), act.data(), std::ssize(x));
        FfnScratch scratch;
        GroupedFfn(items, act.data(), y.data(), scratch, pool);
        for (int e = 0; e < 4; ++e) {
          const auto part = [&](const char* name) {
            return ReadWide(files.checkpoint(), StrCat("e", e, ".", name, "_proj.weight"));
          };
          const auto begin = x.begin() + items[e].begin * hidden;
          const auto want = reference::SwiGlu({begin, begin + counts[e] * hidden}, part("gate"), part("up"),
                                              part("down"), counts[e], hidden, inner);
          double error = 0, norm = 0;
          for (size_t i = 0; i < want.size(); ++i) {
            const double difference = y[items[e].begin * hidden + i] - want[i];
            error += difference * difference;
            norm += want[i] * want[i];
          }
          EXPECT_LE(std::sqrt(error), std::sqrt(norm) * (precision == Precision::kExact ? 1e-6 : 5e-3));
        }
      }
    }
  }
}

}  // namespace
}  // namespace minke::kernels
