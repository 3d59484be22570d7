// Decode steps of an attention node as graphs, segment by segment: the bits of the same launches.
#include <cmath>

#include "libs/cuda_model/decode_segments.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "tests/gpu/gpu_support.h"
#include "tests/gpu/small_attention.h"
#include "tests/gpu/stack_configs.h"

namespace minke::cuda_model {
namespace {

using Form = DecodeSegments::Form;

// What the experts would have answered: numbers that depend on layer, row and step.
void FillSums(float* sums, int64_t values, int64_t seed) {
  std::mt19937 rng(static_cast<uint32_t>(seed));
  for (int64_t i = 0; i < values; ++i) sums[i] = static_cast<float>(rng() % 2001) / 1000 - 1;
}

struct Result {
  std::vector<std::vector<bf16>> normed;  // of every MoE layer
  std::vector<float> logits;
  bool operator==(const Result&) const = default;
};

// Sequences with prompts in the cache, and lanes that decode them.
class Segments : public testing::TestWithParam<const char*> {
 protected:
  struct Lane {
    std::unique_ptr<GpuBatch> batch;
    cuda::PinnedBuffer sums, normed;
    std::unique_ptr<DecodeSegments> segments;
  };

  void SetUp() override {
    const std::string shape = GetParam();
    const std::string config = shape == "V2"     ? testing_support::V2Config()
                               : shape == "Lite" ? testing_support::LiteConfig()
                                                 : testing_support::TinyConfigJson();
    ASSERT_TRUE(
        MakeCheckpoint({.directory = dir_.path() + "/model", .config_json = config, .seed = 5, .threads = 8})
            .ok());
    const auto checkpoint = Checkpoint::Open(dir_.path() + "/model").value();
    model_ = AttentionOnGpu::Create(WeightsFromDisk(*checkpoint, {}).value(), SmallOptions()).value();
    const ModelConfig& c = model_->config();
    for (int i = 0; i < 2; ++i) {
      Lane lane;
      lane.batch = model_->MakeBatch().value();
      lane.sums = cuda::PinnedBuffer::Allocate(256 * c.hidden_size * 4).value();
      lane.normed = cuda::PinnedBuffer::Allocate(256 * c.hidden_size * 2).value();
      FillSums(lane.sums.as<float>(), 256 * c.hidden_size, 1);
      lane.segments = DecodeSegments::Create(*model_, *lane.batch, lane.sums.as<float>(),
                                             lane.normed.as<bf16>(), {.context_max = 128})
                          .value();
      lanes_.push_back(std::move(lane));
    }
    std::mt19937 rng(9);
    for (uint32_t s = 0; s < 6; ++s) {
      pages_.push_back({2 * s, 2 * s + 1});
      tokens_.emplace_back();
      for (int i = 0; i < 128; ++i) tokens_.back().push_back(rng() % c.vocab_size);
      const GpuChunk prompt = {std::span(tokens_[s]).first(20 + 9 * s), 0, pages_[s]};
      ASSERT_TRUE(model_->Begin(*lanes_[0].batch, {&prompt, 1}).ok());
      ASSERT_TRUE(model_->Embed(*lanes_[0].batch).ok());
      for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
        ASSERT_TRUE(model_->Attention(layer, *lanes_[0].batch).ok());
        ASSERT_TRUE(model_->FeedForward(layer, *lanes_[0].batch).ok());
      }
    }
    ASSERT_TRUE(model_->Synchronize().ok());
  }

  // The n-th token after the prompts of sequences [first, first + count).
  std::vector<DecodeInput> Inputs(int first, int count, int n) const {
    std::vector<DecodeInput> inputs;
    for (int s = first; s < first + count; ++s) {
      const int64_t position = 20 + 9 * s + n;
      inputs.push_back({tokens_[s][position], position, pages_[s], {}});
    }
    return inputs;
  }

  // Attention of one layer, and what comes of it.
  void Layer(Lane& lane, int32_t layer, int64_t rows, int step, Result& result) {
    const ModelConfig& c = model_->config();
    ASSERT_TRUE(lane.segments->Attention(layer).ok());
    if (c.IsMoeLayer(layer)) {
      ASSERT_TRUE(model_->Synchronize().ok());
      const bf16* normed = lane.normed.as<bf16>();
      result.normed.emplace_back(normed, normed + rows * c.hidden_size);
    }
    ASSERT_TRUE(lane.segments->FeedForward(layer).ok());
    if (c.IsMoeLayer(layer)) FillSums(lane.sums.as<float>(), rows * c.hidden_size, 100 * step + layer);
  }
  void Logits(Lane& lane, int64_t rows, Result& result) {
    ASSERT_TRUE(lane.segments->Logits().ok());
    result.logits = model_->DownloadLogits(rows).value();
  }

  Result Step(Lane& lane, const std::vector<DecodeInput>& inputs, int step, Form form) {
    Result result;
    const absl::Status begun = lane.segments->Begin(inputs, form);
    EXPECT_TRUE(begun.ok()) << begun;
    for (int32_t layer = 0; layer < model_->config().num_hidden_layers; ++layer) {
      Layer(lane, layer, std::ssize(inputs), step, result);
    }
    Logits(lane, std::ssize(inputs), result);
    return result;
  }

  // The same step through AttentionOnGpu's own calls, without padding.
  std::vector<float> PlainLogits(const std::vector<DecodeInput>& inputs, int step) {
    const ModelConfig& c = model_->config();
    GpuBatch& batch = *lanes_[0].batch;
    std::vector<GpuChunk> chunks;
    for (const DecodeInput& input : inputs)
      chunks.push_back({{&input.token, 1}, input.position, input.pages});
    EXPECT_TRUE(model_->Begin(batch, chunks).ok());
    EXPECT_TRUE(model_->Embed(batch).ok());
    for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
      EXPECT_TRUE(model_->Attention(layer, batch).ok());
      EXPECT_TRUE(model_->FeedForward(layer, batch).ok());
      if (!c.IsMoeLayer(layer)) continue;
      EXPECT_TRUE(model_->Synchronize().ok());
      FillSums(lanes_[0].sums.as<float>(), std::ssize(inputs) * c.hidden_size, 100 * step + layer);
      EXPECT_TRUE(model_->AddSums(batch, lanes_[0].sums.as<float>()).ok());
    }
    EXPECT_TRUE(model_->Logits(batch, nullptr, std::ssize(inputs)).ok());
    return model_->DownloadLogits(std::ssize(inputs)).value();
  }

  testing_support::TempDir dir_;
  std::unique_ptr<AttentionOnGpu> model_;
  std::vector<Lane> lanes_;
  std::vector<std::vector<uint32_t>> tokens_, pages_;
};
INSTANTIATE_TEST_SUITE_P(Shapes, Segments, testing::Values("V2", "Lite", "Odd"),
                         [](const auto& info) { return info.param; });

TEST_P(Segments, GraphsGiveTheBitsOfLaunches) {
  int step = 0;
  for (const int rows : {1, 4, 3, 6}) {  // full and partly filled buckets
    for (int n = 0; n < 2; ++n, ++step) {
      const std::vector<DecodeInput> inputs = Inputs(0, rows, step);
      const Result launched = Step(lanes_[0], inputs, step, Form::kLaunches);
      EXPECT_EQ(Step(lanes_[0], inputs, step, Form::kGraph), launched) << rows << " rows";
      EXPECT_EQ(Step(lanes_[0], inputs, step, Form::kGraph), launched) << rows << " rows, again";
      const std::vector<float> plain = PlainLogits(inputs, step);
      if (rows == 1 || rows == 4) {  // the very products
        EXPECT_EQ(launched.logits, plain) << rows << " rows";
        continue;
      }
      double error = 0, norm = 0;
      for (size_t i = 0; i < plain.size(); ++i) {
        error += std::pow(double{plain[i]} - launched.logits[i], 2), norm += std::pow(double{plain[i]}, 2);
      }
      EXPECT_LE(std::sqrt(error / norm), 3e-2) << rows << " rows, padded";
    }
  }
}

// Sums that are on the device already, and rows that stay there: the bits of those that cross page-locked
// memory.
TEST_P(Segments, RowsAndSumsOnTheDeviceGiveTheSameBits) {
  const ModelConfig& c = model_->config();
  Lane& lane = lanes_[1];
  auto sums = cuda::DeviceBuffer::Allocate(256 * c.hidden_size * 4).value();
  const cuda::PinnedBuffer& staged = lane.sums;  // what the experts answer
  const auto segments = DecodeSegments::Create(*model_, *lane.batch, sums.as<float>(), nullptr,
                                               {.context_max = 128, .on_device = true})
                            .value();
  const auto upload = [&] { ASSERT_TRUE(sums.Upload(staged.as(), sums.bytes(), model_->stream()).ok()); };
  for (const int rows : {1, 3, 6}) {
    const std::vector<DecodeInput> inputs = Inputs(0, rows, rows);
    const Result want = Step(lanes_[0], inputs, rows, Form::kLaunches);
    for (const Form form : {Form::kLaunches, Form::kGraph, Form::kGraph}) {
      upload();
      ASSERT_TRUE(segments->Begin(inputs, form).ok());
      Result got;
      for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
        ASSERT_TRUE(segments->Attention(layer).ok());
        if (c.IsMoeLayer(layer)) {
          std::vector<bf16> normed(rows * c.hidden_size);
          ASSERT_TRUE(model_->DownloadNormed(*lane.batch, lane.normed.as<bf16>()).ok());
          ASSERT_TRUE(model_->Synchronize().ok());
          std::copy_n(lane.normed.as<bf16>(), normed.size(), normed.begin());
          got.normed.push_back(std::move(normed));
        }
        ASSERT_TRUE(segments->FeedForward(layer).ok());
        if (!c.IsMoeLayer(layer)) continue;
        FillSums(staged.as<float>(), rows * c.hidden_size, 100 * rows + layer);
        upload();
        ASSERT_TRUE(model_->Synchronize().ok());
      }
      ASSERT_TRUE(segments->Logits().ok());
      got.logits = model_->DownloadLogits(rows).value();
      EXPECT_EQ(got, want) << rows << " rows";
    }
  }
}

TEST_P(Segments, TwoBatchesInTurnDoNotDisturbEachOther) {
  const std::vector<DecodeInput> a = Inputs(0, 3, 0), b = Inputs(3, 2, 0);
  const Result want_a = Step(lanes_[0], a, 0, Form::kLaunches),
               want_b = Step(lanes_[1], b, 1, Form::kLaunches);
  for (int round = 0; round < 2; ++round) {  // in the first, graphs are made while the other is under way
    Result got_a, got_b;
    ASSERT_TRUE(lanes_[0].segments->Begin(a).ok());
    for (int32_t layer = 0; layer < model_->config().num_hidden_layers; ++layer) {
      Layer(lanes_[0], layer, 3, 0, got_a);
      if (layer == 0) {
        ASSERT_TRUE(lanes_[1].segments->Begin(b).ok());
      }
      Layer(lanes_[1], layer, 2, 1, got_b);
    }
    Logits(lanes_[0], 3, got_a);
    Logits(lanes_[1], 2, got_b);
    EXPECT_EQ(got_a, want_a);
    EXPECT_EQ(got_b, want_b);
  }
}

TEST_P(Segments, RowsOutsideTheLimitsAreRefused) {
  std::vector<DecodeInput> inputs = Inputs(0, 1, 0);
  inputs[0].position = 128;
  EXPECT_EQ(lanes_[0].segments->Begin(inputs).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(lanes_[0].segments->Begin(std::vector<DecodeInput>(17, Inputs(0, 1, 0)[0])).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace minke::cuda_model
