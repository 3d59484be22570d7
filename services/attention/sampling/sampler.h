// Logits to a token, and log-probabilities. Pure functions; thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

namespace minke::attention {

// Meaning of every field: proto/inference/inference.proto, SamplingParams.
struct SamplingParams {
  float temperature = 1;
  float top_p = 1;
  uint32_t top_k = 0;
  float min_p = 0;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;
  uint64_t seed = 0;
  std::vector<std::pair<uint32_t, float>> logit_bias;
  std::vector<uint32_t> stop_token_ids;
  uint32_t max_tokens = 0;
  bool want_logprobs = false;
  uint32_t top_logprobs = 0;
  bool want_prompt_logprobs = false;
  uint32_t top_prompt_logprobs = 0;
};

// How often each token occurs so far; kept only for requests with penalties.
struct TokenCounts {
  std::unordered_map<uint32_t, uint32_t> generated;
  std::unordered_map<uint32_t, uint32_t> prompt;  // presence matters only
};

struct TokenLogprobs {
  uint32_t token = 0;
  float logprob = 0;
  std::vector<std::pair<uint32_t, float>> top;  // descending; ties: lowest id first
};

// The next token. `logits` [vocab] is scratch: penalties, bias and mask are applied in place.
// `allowed` [vocab] (or empty: all) masks ids that have no token. The draw is f(seed, position), position
// being the index of the new token in its sequence, so a request that moves continues the same way.
uint32_t Sample(const SamplingParams& params, const TokenCounts& counts, std::span<const uint8_t> allowed,
                int64_t position, std::span<float> logits);

// Natural log-probability of `token` and of the `top` most likely ones under softmax(logits), all ids
// counted.
TokenLogprobs Logprobs(std::span<const float> logits, uint32_t token, uint32_t top);

// Uniform in [0, 1), a pure function.
double UniformDraw(uint64_t seed, int64_t position);

}  // namespace minke::attention
