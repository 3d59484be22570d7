#include "services/attention/sampling/sampler.h"

#include <cmath>
#include <map>
#include <random>

#include "gtest/gtest.h"

namespace minke::attention {
namespace {

uint32_t Draw(const SamplingParams& params, std::vector<float> logits, int64_t position = 0,
              const TokenCounts& counts = {}, const std::vector<uint8_t>& allowed = {}) {
  return Sample(params, counts, allowed, position, logits);
}

// Share of each token over many positions.
std::map<uint32_t, double> Shares(const SamplingParams& params, const std::vector<float>& logits,
                                  int draws = 20000) {
  std::map<uint32_t, double> shares;
  for (int i = 0; i < draws; ++i) shares[Draw(params, logits, i)] += 1.0 / draws;
  return shares;
}

TEST(Sample, ZeroTemperatureTakesTheLargestAndTheLowerIdOfATie) {
  EXPECT_EQ(Draw({.temperature = 0}, {1, 3, 3, 2}), 1u);
}

TEST(Sample, DrawIsAFunctionOfSeedAndPosition) {
  const std::vector<float> logits(100, 0.0f);
  const SamplingParams a{.seed = 1}, b{.seed = 2};
  int same = 0;
  for (int i = 0; i < 200; ++i) {
    EXPECT_EQ(Draw(a, logits, i), Draw(a, logits, i));
    same += Draw(a, logits, i) == Draw(b, logits, i);
  }
  EXPECT_LT(same, 15);
}

TEST(Sample, FollowsTheDistributionAtItsTemperature) {
  const std::vector<float> logits = {0, 1, 2, -1};
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    double total = 0;
    for (const float l : logits) total += std::exp(l / temperature);
    const auto shares = Shares({.temperature = temperature, .seed = 9}, logits);
    for (size_t i = 0; i < logits.size(); ++i) {
      const auto it = shares.find(i);
      EXPECT_NEAR(it == shares.end() ? 0 : it->second, std::exp(logits[i] / temperature) / total, 0.015);
    }
  }
}

TEST(Sample, TopKTopPAndMinPKeepTheBest) {
  const std::vector<float> logits = {std::log(0.4f), std::log(0.1f), std::log(0.3f), std::log(0.2f)};
  EXPECT_EQ(Shares({.top_k = 2}, logits, 2000).size(), 2u);
  EXPECT_EQ(Shares({.top_p = 0.65f}, logits, 2000).size(), 2u);  // 0.4 + 0.3 reaches 0.65
  EXPECT_EQ(Shares({.top_p = 0.75f}, logits, 2000).size(), 3u);
  EXPECT_EQ(Shares({.top_p = 1e-6f}, logits, 200).begin()->first, 0u);
  EXPECT_EQ(Shares({.min_p = 0.6f}, logits, 2000).size(), 2u);  // at least 0.6 x 0.4
  const auto both =
      Shares({.top_p = 0.5f, .top_k = 3}, logits, 2000);  // of the 0.9 that top-k left: 0.4 / 0.9 < 0.5
  EXPECT_EQ(both.size(), 2u);
}

TEST(Sample, TopPOverALargeVocabularyMatchesASort) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal(0, 1.5f);
  std::vector<float> logits(5000);
  for (float& l : logits) l = normal(rng);
  std::vector<double> p(logits.size());
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) total += p[i] = std::exp(logits[i]);
  std::vector<uint32_t> order(p.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return p[a] > p[b]; });
  double mass = 0;
  std::map<uint32_t, bool> kept;
  for (const uint32_t id : order) {
    kept[id] = true;
    if ((mass += p[id] / total) >= 0.8) break;
  }
  EXPECT_GT(kept.size(), 300u);  // beyond the first sorted stretch
  for (const auto& [token, share] : Shares({.top_p = 0.8f, .seed = 4}, logits, 5000))
    EXPECT_TRUE(kept.contains(token)) << token;
}

TEST(Sample, PenaltiesAndBiasFollowTheirDefinitions) {
  TokenCounts counts;
  counts.generated = {{0, 3}, {1, 1}};
  counts.prompt = {{2, 5}};
  const SamplingParams greedy{.temperature = 0};
  SamplingParams p = greedy;
  p.presence_penalty = 1;  // 3 - 1 < 2.5
  EXPECT_EQ(Draw(p, {3, 0, 2.5f, 0}, 0, counts), 2u);
  p = greedy;
  p.frequency_penalty = 0.5f;  // 3 - 1.5 < 1.6, token 1: 2 - 0.5 < 1.6
  EXPECT_EQ(Draw(p, {3, 2, 0, 1.6f}, 0, counts), 3u);
  p = greedy;
  p.repetition_penalty = 2;  // positive halves, negative doubles; the prompt counts too
  EXPECT_EQ(Draw(p, {3, 1, 3.5f, 1.9f}, 0, counts), 3u);
  EXPECT_EQ(Draw(p, {-1, -1, -1, -1.5f}, 0, counts), 3u);
  p = greedy;
  p.logit_bias = {{3, 100.0f}};
  EXPECT_EQ(Draw(p, {9, 0, 0, -5}), 3u);
  p.logit_bias = {{0, -100.0f}};
  EXPECT_EQ(Draw(p, {9, 0, 1, -5}), 2u);
}

TEST(Sample, IdsWithoutATokenAreNeverDrawn) {
  const std::vector<uint8_t> allowed = {0, 1, 0, 1};
  for (int i = 0; i < 200; ++i) {
    const uint32_t token = Draw({.seed = 5}, {9, 0, 9, 0}, i, {}, allowed);
    EXPECT_TRUE(token == 1 || token == 3);
  }
  EXPECT_EQ(Draw({.temperature = 0}, {9, 0, 9, 1}, 0, {}, allowed), 3u);
}

TEST(Logprobs, AreOverAllIdsWithTheBestInOrder) {
  const std::vector<float> logits = {1, 4, 2, 4, -3};
  double total = 0;
  for (const float l : logits) total += std::exp(l);
  const TokenLogprobs got = Logprobs(logits, 2, 3);
  EXPECT_NEAR(got.logprob, 2 - std::log(total), 1e-6);
  ASSERT_EQ(got.top.size(), 3u);
  EXPECT_EQ(got.top[0].first, 1u);  // tie: lowest id first
  EXPECT_EQ(got.top[1].first, 3u);
  EXPECT_EQ(got.top[2].first, 2u);
  EXPECT_EQ(got.top[2].second, got.logprob);
  EXPECT_EQ(Logprobs(logits, 0, 20).top.size(), 5u);
}

}  // namespace
}  // namespace minke::attention
