// What the oracle says (tests/golden/make_golden.py), and the checkpoint it says it of, made anew.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace minke::testing_support {

struct Golden {
  std::string checkpoint;  // directory, made by this process
  std::vector<uint32_t> input_ids;
  std::vector<float> token_logprobs;   // of input_ids[1...]
  std::vector<int> routing;            // [moe layers, tokens, k], ascending
  std::vector<float> routing_margins;  // [moe layers, tokens], relative
  std::vector<uint32_t> greedy_prompt, greedy_ids;
  std::vector<float> greedy_gaps;  // logit gap of the best two, per generated token
  std::vector<float> bf16_forced_token_logprobs;

  // `name`: v2, lite, plain, mscale. Aborts if anything is missing: fixtures are part of the repository.
  static const Golden& Get(const std::string& name);
};

}  // namespace minke::testing_support
