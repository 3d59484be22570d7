// Parses and validates the bodies of /v1/completions and /v1/chat/completions, down to token ids. Pure
// functions; thread-safe. Tokenising megabytes takes a while: not for a thread that others wait for.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "services/gateway/generation/types.h"
#include "services/gateway/openai/error.h"

namespace minke::gateway {

enum class Endpoint { kCompletions, kChat };

struct PreparedPrompt {
  std::shared_ptr<const TokenIds> ids;  // shared by the prompt's choices
  std::string echo_text;                // with echo: the prompt as text
};

struct GenerateRequest {
  Endpoint endpoint = Endpoint::kCompletions;
  std::vector<PreparedPrompt> prompts;
  uint32_t n = 1;  // choices per prompt; choice j of any prompt draws with sampling.seed + j
  bool stream = false;
  bool include_usage = false;
  bool echo = false;
  bool return_token_ids = false;
  float timeout_s = 0;  // from its arrival until everything is generated; 0: none
  std::vector<std::string> stops;
  Sampling sampling;

  size_t num_sequences() const { return prompts.size() * n; }
  uint64_t prompt_tokens() const {  // of each prompt once, however many choices it has
    uint64_t tokens = 0;
    for (const PreparedPrompt& prompt : prompts) tokens += prompt.ids->size();
    return tokens;
  }
};

// A request may ask for this many sequences (prompts times n), stop strings, and bytes per stop string.
inline constexpr size_t kSequencesPerRequestMax = 1024;
inline constexpr size_t kStopStringsMax = 16;
inline constexpr size_t kStopStringBytesMax = 1024;
inline constexpr uint32_t kTopLogprobsMax = 20;
inline constexpr int kTimeoutSecondsMax = 86'400;

std::variant<GenerateRequest, ApiError> ParseRequest(Endpoint endpoint, std::string_view body,
                                                     const GatewayModel& model);

// The ranges, for requests from any edge.
std::optional<ApiError> CheckSampling(const Sampling& sampling, const GatewayModel& model);
std::optional<ApiError> CheckStops(const std::vector<std::string>& stops, const GatewayModel& model);
// `prompt_field` and `max_tokens_field` are what the error names.
std::optional<ApiError> CheckLength(size_t prompt_tokens, uint64_t max_tokens, const GatewayModel& model,
                                    std::string_view prompt_field, std::string_view max_tokens_field);
// Text as a prompt: with BOS where the tokenizer wants it.
std::variant<TokenIds, ApiError> EncodePrompt(std::string_view text, const GatewayModel& model);
std::variant<TokenIds, ApiError> EncodeChat(const std::vector<tokenizer::ChatMessage>& messages,
                                            const GatewayModel& model);
// Adds the model's end-of-sequence ids to the sampling's stop ids.
void AddEndOfSequence(const GatewayModel& model, Sampling* sampling);
uint64_t RandomSeed();

}  // namespace minke::gateway
