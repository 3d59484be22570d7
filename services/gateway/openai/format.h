// Answers of /v1/completions and /v1/chat/completions as JSON: whole ones and stream chunks. Pure;
// thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "libs/tokenizer/tokenizer.h"
#include "services/gateway/generation/types.h"
#include "services/gateway/openai/request.h"

namespace minke::gateway {

// What every chunk of an answer repeats.
struct AnswerHead {
  Endpoint endpoint = Endpoint::kCompletions;
  std::string id;
  std::string model;
  int64_t created = 0;                              // Unix seconds
  const tokenizer::Tokenizer* tokenizer = nullptr;  // borrowed; null: none
  bool include_usage = false;                       // chunks carry "usage": null
  bool return_token_ids = false;
};

struct LogprobEntry {
  uint32_t token_id = 0;
  std::optional<float> logprob;  // none: the first token of an echoed prompt
  std::vector<std::pair<uint32_t, float>> top;
  uint64_t text_offset = 0;
};

// One choice of a whole answer, or what one chunk adds to it.
struct ChoiceContent {
  uint32_t index = 0;
  bool first = false;  // chunk: chat's role, and prompt_token_ids
  std::string text;
  bool want_logprobs = false;
  std::vector<LogprobEntry> logprobs;
  TokenIds token_ids;
  const TokenIds* prompt_token_ids = nullptr;  // borrowed; written with return_token_ids (chunk: if first)
  FinishReason finish = FinishReason::kNone;
};

struct Usage {
  uint64_t prompt_tokens = 0;
  uint64_t completion_tokens = 0;
  uint64_t cached_tokens = 0;
};

std::string WholeAnswer(const AnswerHead& head, const std::vector<ChoiceContent>& choices,
                        const Usage& usage);

// Appends `data: {...}\n\n`.
void AppendChunk(const AnswerHead& head, const ChoiceContent& content, std::string* out);
// The chunk without choices that stream_options.include_usage asks for.
void AppendUsageChunk(const AnswerHead& head, const Usage& usage, std::string* out);
void AppendErrorEvent(const ApiError& error, std::string* out);
inline constexpr char kDoneEvent[] = "data: [DONE]\n\n";

}  // namespace minke::gateway
