// What a generation is, in the gateway's own words: the HTTP and gRPC edges both end here, and
// attention_client turns it into messages. Plain values.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "libs/tokenizer/chat_template.h"
#include "libs/tokenizer/tokenizer.h"

namespace minke::gateway {

using TokenIds = std::vector<uint32_t>;

// Limits and defaults follow OpenAI's API; docs/openai_api.md.
struct Sampling {
  float temperature = 1;
  float top_p = 1;
  uint32_t top_k = 0;  // 0: off
  float min_p = 0;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;
  uint64_t seed = 0;
  std::vector<std::pair<uint32_t, float>> logit_bias;
  TokenIds stop_token_ids;           // end-of-sequence ids included unless the caller ignores them
  uint32_t max_tokens = 0;           // 0: score only
  std::optional<uint32_t> logprobs;  // of generated tokens, with that many alternatives
  bool prompt_logprobs = false;      // of prompt tokens 1..n-1, with as many
};

// By which other processes name what they do for a request.
struct SequenceOrigin {
  std::string request_id;   // in their logs
  std::string traceparent;  // of a traced one (W3C Trace Context); else empty
};

// One sequence of a request.
struct SequenceSpec {
  std::shared_ptr<const TokenIds> prompt;  // shared by the n choices of a prompt and by the pool
  Sampling sampling;
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();  // max: none
  SequenceOrigin origin = {};
};

struct TokenLogprob {
  uint32_t token_id = 0;
  float logprob = 0;
  std::vector<std::pair<uint32_t, float>> top;  // descending
};

enum class FinishReason { kNone, kStop, kLength, kError };

// Where the time of the attention node's steps that had rows of a sequence went.
struct PhaseTimes {
  uint32_t steps = 0;
  std::vector<std::pair<const char*, std::chrono::microseconds>> phases;
};
struct NodeTimes {
  PhaseTimes prefill, decode;
};

// What one engine step did for one sequence.
struct SequenceEvent {
  TokenIds token_ids;                  // the stop token included
  std::vector<TokenLogprob> logprobs;  // one per token when wanted
  std::vector<TokenLogprob>
      prompt_logprobs;  // of prompt tokens 1..n-1, in order, possibly over several events
  FinishReason finish = FinishReason::kNone;
  absl::Status error;  // with kError
  uint32_t cached_prompt_tokens = 0;
  std::chrono::microseconds queue_time{0};  // in the node's admission queue; in its first event
  std::optional<NodeTimes> times;           // in the last event; of the last node it was on
  uint32_t moves = 0;                       // in the last event: to another node
};

// The model as the gateway sees it. Immutable once serving.
struct GatewayModel {
  std::string name;                                       // what /v1/models lists
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;  // shared by every request; null: token ids only
  std::optional<tokenizer::ChatTemplate> chat_template;   // none: chat is refused
  std::string no_chat_reason;                             // why, for people
  uint32_t vocab_size = 0;
  uint32_t context_length = 0;  // max_position_embeddings
  TokenIds eos_token_ids;       // of config.json and of the tokenizer
};

}  // namespace minke::gateway
