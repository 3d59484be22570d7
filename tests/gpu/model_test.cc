// The whole model on the GPU against the CPU's in bf16, and against golden text. The CPU is made to use the
// experts the GPU chose, so that a near-tie in a gate does not hide what else may be wrong; CpuModel checks
// that it was one.
#include <algorithm>
#include <fstream>
#include <numeric>

#include "libs/cuda_model/whole_model.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "nlohmann/json.hpp"
#include "services/attention/sampling/sampler.h"
#include "tests/gpu/cpu_model.h"
#include "tests/gpu/gpu_support.h"
#include "tests/gpu/stack_configs.h"

namespace minke::cuda_model {
namespace {

using testing_support::CpuModel;
using testing_support::LiteConfig;
using testing_support::V2Config;

constexpr char kShipped[] = "models/minke-shakespeare";
constexpr int64_t kPages = 48;
constexpr double kLogitsError = 3e-2;

struct Sequence {
  std::vector<uint32_t> tokens;
  std::vector<uint32_t> pages;
};

class Harness {
 public:
  explicit Harness(const std::string& directory, cuda::Path path = cuda::Path::kAuto)
      : checkpoint_(Checkpoint::Open(directory).value()), cpu(checkpoint_, kPages) {
    auto source = CheckpointSource::Create(*checkpoint_);
    WholeModel::Options options;
    options.attention.rows_max = 256;
    options.attention.sequences_max = 16;
    options.attention.cache_pages = kPages;
    options.attention.prefill_keys_max = 320;  // so that a step needs several passes
    options.attention.path = path;
    options.context_max = 512;
    auto made = WholeModel::Create(checkpoint_->config(), *source, options, [](int32_t) {});
    EXPECT_TRUE(made.ok()) << made.status();
    gpu = *std::move(made);
    // Every second page, from both ends: nobody's pages are neighbours.
    for (uint32_t i = 0; i < kPages / 2; ++i) free_.push_back(i % 2 == 0 ? 2 * i : kPages - 2 * i);
  }

  Sequence NewSequence(int64_t tokens, std::mt19937& rng) {
    Sequence sequence;
    for (int64_t i = 0; i < tokens; ++i) sequence.tokens.push_back(rng() % checkpoint_->config().vocab_size);
    for (int64_t i = 0; i * 64 < tokens; ++i) sequence.pages.push_back(free_.back()), free_.pop_back();
    return sequence;
  }

  // Chunks [begin, end) of sequences through both models. Returns the GPU's logits.
  struct Part {
    const Sequence* sequence;
    int64_t begin, end;
  };
  std::vector<float> Compare(std::vector<Part> parts, const std::string& what) {
    std::stable_partition(parts.begin(), parts.end(),
                          [&](const Part& p) { return gpu->attention().Absorbed(p.end - p.begin, p.begin); });
    std::vector<GpuChunk> chunks;
    std::vector<CpuModel::Chunk> cpu_chunks;
    for (const Part& p : parts) {
      const auto tokens = std::span(p.sequence->tokens).subspan(p.begin, p.end - p.begin);
      chunks.push_back({tokens, p.begin, p.sequence->pages});
      cpu_chunks.push_back({{tokens.begin(), tokens.end()}, p.begin, p.sequence->pages});
    }
    CpuModel::Routing routing;
    gpu->SetObserverForTest([&](int32_t layer, std::span<const int32_t> experts) {
      routing[layer].assign(experts.begin(), experts.end());
    });
    const auto stepped = gpu->Step(chunks, std::vector<cuda::SampleRow>(chunks.size()));
    gpu->SetObserverForTest(nullptr);
    EXPECT_TRUE(stepped.ok()) << stepped.status();
    const std::vector<float> got = gpu->attention().DownloadLogits(std::ssize(chunks)).value();
    const std::vector<float> want = cpu.Run(cpu_chunks, routing);
    ExpectLogits(got, want, what);
    for (size_t i = 0; i < chunks.size();
         ++i) {  // the greedy choice is the largest of the logits that came back
      const float* row = &got[i * vocab()];
      EXPECT_EQ((*stepped)[i], std::max_element(row, row + vocab()) - row);
    }
    return got;
  }

  // All rows together, and twice as much for one alone.
  void ExpectLogits(const std::vector<float>& got, const std::vector<float>& want, const std::string& what) {
    ASSERT_EQ(got.size(), want.size());
    double all_error = 0, all_norm = 0;
    for (size_t row = 0; row * vocab() < got.size(); ++row) {
      double error = 0, norm = 0;
      for (size_t i = row * vocab(); i < (row + 1) * vocab(); ++i) {
        error += std::pow(double{got[i]} - want[i], 2), norm += std::pow(double{want[i]}, 2);
      }
      const double relative = std::sqrt(error / norm);
      EXPECT_LE(relative, 2 * kLogitsError) << what << ", row " << row;
      worst = std::max(worst, relative);
      all_error += error, all_norm += norm;
    }
    EXPECT_LE(std::sqrt(all_error / all_norm), kLogitsError) << what;
  }
  size_t vocab() const { return checkpoint_->config().vocab_size; }

 private:
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::vector<uint32_t> free_;

 public:
  CpuModel cpu;
  std::unique_ptr<WholeModel> gpu;
  double worst = 0;
};

std::vector<DecodeInput> Inputs(const std::vector<const Sequence*>& sequences,
                                const std::vector<int64_t>& positions) {
  std::vector<DecodeInput> inputs;
  for (size_t i = 0; i < sequences.size(); ++i) {
    inputs.push_back({sequences[i]->tokens[positions[i]], positions[i], sequences[i]->pages, {}});
  }
  return inputs;
}

// Prompts in pieces beside decoding rows, then decode steps in both forms.
void RunMixture(Harness& h) {
  std::mt19937 rng(3);
  const Sequence a = h.NewSequence(300, rng), b = h.NewSequence(200, rng), c = h.NewSequence(80, rng),
                 d = h.NewSequence(140, rng), e = h.NewSequence(70, rng);
  h.Compare({{&a, 0, 150}, {&b, 0, 1}, {&c, 0, 7}, {&d, 0, 63}}, "prompts");
  h.Compare({{&a, 150, 280}, {&b, 1, 2}, {&c, 7, 11}, {&d, 63, 100}, {&e, 0, 66}}, "prompts go on");
  h.Compare({{&a, 280, 281}, {&b, 2, 150}, {&c, 11, 12}, {&d, 100, 101}}, "decode beside a prompt");
  h.Compare({{&b, 150, 151}}, "one row");
  std::vector<int64_t> at = {281, 151, 12, 101};
  const std::vector<const Sequence*> four = {&a, &b, &c, &d};
  for (int step = 0; step < 5; ++step) {
    const std::vector<float> logits = h.Compare(
        {{&a, at[0], at[0] + 1}, {&b, at[1], at[1] + 1}, {&c, at[2], at[2] + 1}, {&d, at[3], at[3] + 1}},
        "decode");
    const auto inputs = Inputs(four, at);
    std::vector<std::vector<uint32_t>> tokens;
    for (const auto form :
         {WholeModel::Form::kLaunches, WholeModel::Form::kGraph, WholeModel::Form::kGraph}) {
      const auto decoded = h.gpu->Decode(inputs, form);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      tokens.emplace_back(decoded->begin(), decoded->end());
      // One row per sequence in a full bucket: the very products of Step.
      EXPECT_EQ(h.gpu->attention().DownloadLogits(4).value(), logits)
          << "step " << step << ", form " << int(form);
    }
    EXPECT_EQ(tokens[0], tokens[1]);
    EXPECT_EQ(tokens[0], tokens[2]);
    for (int64_t& position : at) ++position;
    if (testing::Test::HasFailure()) return;
  }
  // Three rows in a bucket of four: the padding disturbs nobody, now or later.
  const std::vector<float> alone =
      h.Compare({{&a, at[0], at[0] + 1}, {&b, at[1], at[1] + 1}, {&c, at[2], at[2] + 1}}, "three rows");
  for (const auto form : {WholeModel::Form::kLaunches, WholeModel::Form::kGraph}) {
    const auto padded = h.gpu->Decode(Inputs({&a, &b, &c}, at), form);
    ASSERT_TRUE(padded.ok()) << padded.status();
    h.ExpectLogits(h.gpu->attention().DownloadLogits(3).value(), alone, "padded");
  }
  h.Compare({{&d, at[3], at[3] + 1}, {&e, 66, 67}}, "after padding");
  // More keys than the naive form's workspace holds: a long chunk in the absorbed form.
  const Sequence f = h.NewSequence(380, rng);
  h.Compare({{&f, 0, 190}}, "the begin of a long prompt");
  h.Compare({{&d, at[3] + 1, at[3] + 2}, {&f, 190, 380}}, "the end of a long prompt");
  std::printf(
      "logits' worst relative error %.4f; %ld of %ld rows routed differently by the CPU, in near-ties\n",
      h.worst, long(h.cpu.differently_routed_rows), long(h.cpu.routed_rows));
  EXPECT_LE(h.cpu.differently_routed_rows, h.cpu.routed_rows / 8);  // 160 experts lie close together
}

class RandomStack : public testing::TestWithParam<cuda::Path> {
 protected:
  void Run(const std::string& config, DType dtype = DType::kBF16) {
    testing_support::TempDir dir;
    ASSERT_TRUE(MakeCheckpoint({.directory = dir.path() + "/model",
                                .config_json = config,
                                .seed = 3,
                                .dtype = dtype,
                                .threads = 8})
                    .ok());
    Harness h(dir.path() + "/model", GetParam());
    if (!testing::Test::HasFailure()) RunMixture(h);
  }
};
TEST_P(RandomStack, LiteShapeMatchesTheCpu) { Run(LiteConfig()); }
TEST_P(RandomStack, V2ShapeMatchesTheCpu) { Run(V2Config()); }
TEST_P(RandomStack, OddSmallShapeMatchesTheCpu) {
  std::string config = testing_support::TinyConfigJson();
  const std::string factor = "\"routed_scaling_factor\": 16.0";
  const size_t at = config.find(factor);
  ASSERT_NE(at, std::string::npos);
  Run(config.replace(at, factor.size(), "\"routed_scaling_factor\": 1.0"),
      DType::kF32);  // rounded while loading
}
INSTANTIATE_TEST_SUITE_P(Paths, RandomStack, testing::Values(cuda::Path::kAuto, cuda::Path::kPortable));

// What attention nodes do when a sequence moves: its latents, page by page, to other pages of the same shape.
TEST(ShippedModelOnGpu, ASequenceGoesOnFromPagesThatWereCopied) {
  Harness harness(kShipped);
  std::mt19937 rng(21);
  const Sequence from = harness.NewSequence(131, rng);
  harness.Compare({{&from, 0, 128}}, "prefix");
  Sequence to = harness.NewSequence(131, rng);
  to.tokens = from.tokens;
  const ModelConfig& config = harness.gpu->attention().config();
  std::vector<std::byte> latents(64 * config.latent_dim() * 2), back(latents.size());
  for (int32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    for (int page = 0; page < 2; ++page) {
      ASSERT_TRUE(harness.gpu->attention().ReadPage(layer, from.pages[page], latents.data()).ok());
      ASSERT_TRUE(harness.gpu->attention().WritePage(layer, to.pages[page], latents.data()).ok());
      ASSERT_TRUE(harness.gpu->attention().ReadPage(layer, to.pages[page], back.data()).ok());
      EXPECT_EQ(back, latents) << "layer " << layer << " page " << page;
      EXPECT_NE(latents, std::vector<std::byte>(latents.size())) << "nothing was there to copy";
    }
  }
  const auto logits = [&](const Sequence& sequence) {
    const std::vector<GpuChunk> chunks = {{std::span(sequence.tokens).subspan(128, 3), 128, sequence.pages}};
    const auto stepped = harness.gpu->Step(chunks, std::vector<cuda::SampleRow>(1));
    EXPECT_TRUE(stepped.ok()) << stepped.status();
    return harness.gpu->attention().DownloadLogits(1).value();
  };
  EXPECT_EQ(logits(to), logits(from));
}

TEST(ShippedModelOnGpu, MatchesTheCpu) {
  Harness h(kShipped);
  if (!HasFailure()) RunMixture(h);
}

// As an attention node works: segments, the routed experts elsewhere, two batches in turn.
TEST(ShippedModelOnGpu, SegmentsOfTwoBatchesWithExpertsElsewhere) {
  Harness h(kShipped);
  ASSERT_FALSE(HasFailure());
  std::mt19937 rng(5);
  AttentionOnGpu& model = h.gpu->attention();
  const ModelConfig& config = model.config();
  struct Part {
    Sequence sequence;
    std::unique_ptr<GpuBatch> batch;
    CpuModel::Routing routing;
  };
  std::vector<Part> parts;
  for (const int tokens : {90, 33})
    parts.push_back({h.NewSequence(tokens, rng), model.MakeBatch().value(), {}});
  for (Part& p : parts) {
    const GpuChunk chunk = {p.sequence.tokens, 0, p.sequence.pages};
    ASSERT_TRUE(model.Begin(*p.batch, {&chunk, 1}).ok());
    ASSERT_TRUE(model.Embed(*p.batch).ok());
  }
  for (int32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    for (Part& p : parts) {
      ASSERT_TRUE(model.Attention(layer, *p.batch).ok());
      ASSERT_TRUE(model.FeedForward(layer, *p.batch).ok());
      if (!config.IsMoeLayer(layer)) continue;
      std::vector<bf16> normed(p.batch->rows() * config.hidden_size);
      ASSERT_TRUE(model.DownloadNormed(*p.batch, normed.data()).ok());
      ASSERT_TRUE(model.stream().Synchronize().ok());
      const std::vector<bf16> partials = h.cpu.Partials(layer, normed, p.routing);
      std::vector<int32_t> begin(p.batch->rows() + 1);
      std::iota(begin.begin(), begin.end(), 0);
      if (layer % 2 == 0) {
        ASSERT_TRUE(model.AddPartials(*p.batch, begin, partials.data()).ok());
      } else {
        std::vector<float> wide(partials.size());
        std::transform(partials.begin(), partials.end(), wide.begin(), BF16ToF32);
        ASSERT_TRUE(model.AddPartials(*p.batch, begin, wide.data()).ok());
      }
    }
  }
  for (Part& p : parts) {
    const int32_t last[] = {static_cast<int32_t>(p.batch->rows()) - 1};
    ASSERT_TRUE(model.Logits(*p.batch, last).ok());
    h.ExpectLogits(model.DownloadLogits(1).value(),
                   h.cpu.Run({{p.sequence.tokens, 0, p.sequence.pages}}, p.routing), "segments");
  }
  const std::vector<int32_t> wrong = {0, 1};
  EXPECT_EQ(model.AddPartials(*parts[0].batch, wrong, std::vector<bf16>(1000).data()).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ShippedModelOnGpu, GreedyTextIsGolden) {
  std::ifstream file("tests/golden/shakespeare_greedy.json");
  ASSERT_TRUE(file.good());
  const auto golden = nlohmann::json::parse(file);
  Harness h(kShipped);
  ASSERT_FALSE(HasFailure());
  std::mt19937 rng(1);
  for (const auto& prompt : golden["prompts"]) {
    const std::vector<uint32_t> ids = prompt["prompt_ids"], want = prompt["ids"];
    const std::vector<float> gaps = prompt["gaps"];
    Sequence s = h.NewSequence(128, rng);
    s.tokens = ids;
    const GpuChunk chunk = {s.tokens, 0, s.pages};
    const auto first = h.gpu->Step({&chunk, 1}, std::vector<cuda::SampleRow>(1));
    ASSERT_TRUE(first.ok()) << first.status();
    s.tokens.push_back((*first)[0]);
    while (s.tokens.size() < ids.size() + want.size()) {
      const auto decoded = h.gpu->Decode(Inputs({&s}, {std::ssize(s.tokens) - 1}));
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      s.tokens.push_back((*decoded)[0]);
    }
    size_t same = 0;
    while (same < want.size() && s.tokens[ids.size() + same] == want[same]) ++same;
    // The golden text is f32's. bf16 moves logits by up to 0.1: a smaller gap between the best two may turn
    // over.
    if (same < want.size()) {
      EXPECT_LT(gaps[same], 0.3f) << "token " << same;
      std::printf("prompt of %zu: the text parts from f32's at token %zu, where the gap is %.3f\n",
                  ids.size(), same, double{gaps[same]});
    }
    EXPECT_GE(same, 12u);
  }
}

// A request that moves between a GPU and a CPU goes on with the same tokens.
TEST(ShippedModelOnGpu, DrawsAreTheHostSamplersOfTheSameLogits) {
  Harness h(kShipped);
  ASSERT_FALSE(HasFailure());
  std::mt19937 rng(11);
  std::vector<Sequence> sequences;
  std::vector<DecodeInput> inputs;
  for (int i = 0; i < 5; ++i) sequences.push_back(h.NewSequence(64, rng));
  int different = 0;
  for (int64_t position = 0; position < 40; ++position) {
    inputs.clear();
    for (const Sequence& s : sequences) {
      const float top_p = inputs.size() % 2 == 0 ? 0.9f : 1;
      inputs.push_back({s.tokens[position],
                        position,
                        s.pages,
                        {.seed = rng(), .position = position + 1, .temperature = 0.8f, .top_p = top_p}});
    }
    const auto decoded = h.gpu->Decode(inputs);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    const std::vector<uint32_t> tokens(decoded->begin(), decoded->end());
    std::vector<float> logits = h.gpu->attention().DownloadLogits(std::ssize(inputs)).value();
    for (size_t i = 0; i < inputs.size(); ++i) {
      const cuda::SampleRow& row = inputs[i].sampling;
      attention::SamplingParams params;
      params.temperature = row.temperature, params.top_p = row.top_p, params.seed = row.seed;
      different += tokens[i] != attention::Sample(params, {}, {}, row.position,
                                                  std::span(logits).subspan(i * h.vocab(), h.vocab()));
    }
  }
  EXPECT_LE(different, 1) << "of 200: only where the draw falls on a boundary to the last bit";
}

TEST(ShippedModelOnGpu, InputsOutsideTheLimitsAreRefused) {
  Harness h(kShipped);
  ASSERT_FALSE(HasFailure());
  std::mt19937 rng(1);
  Sequence s = h.NewSequence(70, rng);
  const auto step = [&](int64_t position, std::span<const uint32_t> pages) {
    const GpuChunk chunk = {s.tokens, position, pages};
    return h.gpu->Step({&chunk, 1}, std::vector<cuda::SampleRow>(1)).status().code();
  };
  EXPECT_EQ(step(0, std::span(s.pages).first(1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(step(-1, s.pages), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(step(0, std::vector<uint32_t>{0, kPages}), absl::StatusCode::kInvalidArgument);
  s.tokens[3] = 1 << 20;
  EXPECT_EQ(step(0, s.pages), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(h.gpu->Decode(Inputs({&s}, {3})).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(h.gpu->Decode(std::vector<DecodeInput>(17, {1, 0, s.pages, {}})).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace minke::cuda_model
