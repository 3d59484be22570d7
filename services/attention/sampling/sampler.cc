#include "services/attention/sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "libs/kernels/cpu/tile_kernels.h"

namespace minke::attention {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void ApplyPenalties(const SamplingParams& params, const TokenCounts& counts, std::span<float> logits) {
  const auto repeated = [&](uint32_t token) {
    float& logit = logits[token];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  };
  if (params.repetition_penalty != 1 && params.repetition_penalty > 0) {
    for (const auto& [token, count] : counts.prompt) repeated(token);
    for (const auto& [token, count] : counts.generated) {
      if (!counts.prompt.contains(token)) repeated(token);
    }
  }
  if (params.presence_penalty != 0 || params.frequency_penalty != 0) {
    for (const auto& [token, count] : counts.generated) {
      logits[token] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
    }
  }
  for (const auto& [token, bias] : params.logit_bias) logits[token] += bias;
}

uint32_t ArgMax(std::span<const float> logits) {
  return static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

struct Candidate {
  float weight;  // probability, not normalised
  uint32_t token;
};

bool Better(const Candidate& a, const Candidate& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

// The smallest prefix, by descending weight, that holds `top_p` of the total and at most `top_k` tokens.
void Truncate(std::vector<Candidate>& candidates, double total, double top_p, size_t top_k) {
  // Sorted lazily: the first few hundred nearly always suffice.
  double mass = 0;
  size_t sorted = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (i == sorted) {
      sorted = std::min(candidates.size(), std::max<size_t>(256, 4 * sorted));
      std::partial_sort(candidates.begin() + i, candidates.begin() + sorted, candidates.end(), Better);
    }
    mass += candidates[i].weight;
    if (i + 1 >= top_k || mass >= top_p * total) {
      candidates.resize(i + 1);
      return;
    }
  }
}

}  // namespace

double UniformDraw(uint64_t seed, int64_t position) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

uint32_t Sample(const SamplingParams& params, const TokenCounts& counts, std::span<const uint8_t> allowed,
                int64_t position, std::span<float> logits) {
  ApplyPenalties(params, counts, logits);
  for (size_t i = 0; i < allowed.size(); ++i) {
    if (!allowed[i]) logits[i] = -std::numeric_limits<float>::infinity();
  }
  const uint32_t best = ArgMax(logits);
  if (params.temperature == 0 || !std::isfinite(logits[best])) return best;

  static thread_local std::vector<Candidate> candidates;
  candidates.clear();
  double total = 0;
  const float floor = params.min_p > 0 ? params.min_p : 0;  // relative to the best token's probability
  for (size_t i = 0; i < logits.size(); ++i) {
    const float weight = std::exp((logits[i] - logits[best]) / params.temperature);
    if (weight <= 0 || weight < floor) continue;
    candidates.push_back({weight, static_cast<uint32_t>(i)});
    total += weight;
  }
  const size_t top_k = params.top_k > 0 ? params.top_k : candidates.size();
  if (params.top_p < 1 || top_k < candidates.size()) {
    // top-k first, then top-p of what it left.
    if (top_k < candidates.size()) {
      Truncate(candidates, total, 2.0, top_k);
      total = 0;
      for (const Candidate& candidate : candidates) total += candidate.weight;
    }
    if (params.top_p < 1) Truncate(candidates, total, params.top_p, candidates.size());
    total = 0;
    for (const Candidate& candidate : candidates) total += candidate.weight;
  }
  double left = UniformDraw(params.seed, position) * total;
  for (const Candidate& candidate : candidates) {
    left -= candidate.weight;
    if (left < 0) return candidate.token;
  }
  return candidates.back().token;
}

TokenLogprobs Logprobs(std::span<const float> logits, uint32_t token, uint32_t top) {
  const float maximum = kernels::Tiles().max(logits.data(), std::ssize(logits));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - maximum);
  const double log_sum = maximum + std::log(sum);
  TokenLogprobs out{token, static_cast<float>(logits[token] - log_sum), {}};
  if (top == 0) return out;
  std::vector<Candidate> best;
  best.reserve(top + 1);
  for (size_t i = 0; i < logits.size(); ++i) {  // insertion into the best so far
    const Candidate candidate{logits[i], static_cast<uint32_t>(i)};
    if (best.size() == top && !Better(candidate, best.back())) continue;
    best.insert(std::upper_bound(best.begin(), best.end(), candidate, Better), candidate);
    if (best.size() > top) best.pop_back();
  }
  for (const Candidate& candidate : best) {
    out.top.emplace_back(candidate.token, static_cast<float>(candidate.weight - log_sum));
  }
  return out;
}

}  // namespace minke::attention
