// models/minke-shakespeare, as it is in the repository: the cluster computes what the training code computed
// (tests/golden/shakespeare_*.json, made by tools/train/fixtures.py).
#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>

#include "gtest/gtest.h"
#include "libs/base/utf8.h"
#include "libs/model/checkpoint.h"
#include "libs/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::Generation;
using testing_support::Greedy;
using testing_support::LocalCluster;

constexpr char kModel[] = "models/minke-shakespeare";

nlohmann::json Fixture(const std::string& name) {
  std::ifstream file("tests/golden/" + name + ".json");
  EXPECT_TRUE(file.good()) << name;
  return nlohmann::json::parse(file);
}

// Per position: |log-probability of the next token - the training code's|.
std::vector<double> LogprobErrors(Precision precision) {
  LocalCluster cluster({.checkpoint = kModel, .precision = precision});
  std::vector<double> errors;
  const nlohmann::json fixture = Fixture("shakespeare_logits");
  for (const auto& sequence : fixture["sequences"]) {
    const std::vector<float> want = sequence["next_logprobs"];
    const Generation result = cluster.Run(Greedy(sequence["ids"].get<std::vector<uint32_t>>(), 0, true));
    EXPECT_TRUE(result.error.ok()) << result.error;
    EXPECT_EQ(result.prompt_logprobs.size(), want.size());
    for (size_t i = 0; i < std::min(want.size(), result.prompt_logprobs.size()); ++i) {
      errors.push_back(std::abs(result.prompt_logprobs[i] - want[i]));
    }
  }
  std::sort(errors.begin(), errors.end());
  EXPECT_GT(errors.size(), 250u);
  return errors;
}

TEST(ShippedModel, Loads) {
  const auto checkpoint = Checkpoint::Open(kModel);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelConfig& config = (*checkpoint)->config();
  EXPECT_EQ(config.n_routed_experts, 160);
  EXPECT_EQ(config.n_group, 8);
  EXPECT_GE(config.max_position_embeddings, 4096);
}

// The training code computes in f32 from the same BF16 weights.
TEST(ShippedModel, ExactLogitsAreTheTrainingCodes) {
  EXPECT_LT(LogprobErrors(Precision::kExact).back(), 2e-3);
}

TEST(ShippedModel, Bf16LogitsAgreeWithinRounding) {
  const std::vector<double> errors = LogprobErrors(Precision::kBF16);
  EXPECT_LT(errors[errors.size() / 2], 2e-2);
  EXPECT_LT(errors[errors.size() * 9 / 10], 1e-1);
}

TEST(ShippedModel, GreedyTextIsGolden) {
  const auto tokenizer = tokenizer::Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto prompts = Fixture("shakespeare_greedy")["prompts"];
  ASSERT_EQ(prompts.size(), 3u);
  LocalCluster cluster({.checkpoint = kModel, .precision = Precision::kExact});
  for (const auto& golden : prompts) {
    const auto encoded = (*tokenizer)->Encode(golden["prompt"].get<std::string>());
    ASSERT_TRUE(encoded.ok()) << encoded.status();
    std::vector<uint32_t> prompt = {(*tokenizer)->bos_id().value()};
    prompt.insert(prompt.end(), encoded->begin(), encoded->end());
    EXPECT_EQ(prompt, golden["prompt_ids"].get<std::vector<uint32_t>>());
    const std::vector<uint32_t> want = golden["ids"];
    ASSERT_GE(want.size(), 16u);
    const Generation result = cluster.Run(Greedy(prompt, static_cast<uint32_t>(want.size()), false));
    ASSERT_TRUE(result.error.ok()) << result.error;
    EXPECT_EQ(result.tokens, want);
    tokenizer::StreamingDecoder decoder(**tokenizer);
    std::string text;
    for (const uint32_t token : result.tokens) text += decoder.Push(token);
    EXPECT_EQ(text + decoder.Finish(), golden["text"].get<std::string>());
  }
}

TEST(ShippedModel, TokenizerRoundTripsAnyText) {
  const auto tokenizer = tokenizer::Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  // Every byte string can be said in tokens ...
  for (int byte = 0; byte < 256; ++byte) {
    const std::string one(1, static_cast<char>(byte));
    const auto id = (*tokenizer)->FindToken(one);
    ASSERT_TRUE(id.has_value()) << byte;
    EXPECT_EQ((*tokenizer)->TokenBytes(*id), one);
  }
  // ... and every text in any characters comes back as it was.
  std::mt19937 rng(1);
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (int i = rng() % 60; i > 0; --i) {
      constexpr uint32_t kLimits[] = {0x80, 0x80, 0x800, 0x10000, 0x110000};
      const uint32_t c = rng() % kLimits[rng() % 5];
      if (c < 0xD800 || c > 0xDFFF) AppendUtf8(c, &text);
    }
    const auto ids = (*tokenizer)->Encode(text);
    ASSERT_TRUE(ids.ok()) << ids.status();
    std::string back;
    for (const uint32_t id : *ids) {
      ASSERT_LT(id, 1024u);
      back += (*tokenizer)->TokenBytes(id);
    }
    ASSERT_EQ(back, text);
  }
}

}  // namespace
}  // namespace minke
