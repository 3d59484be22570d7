// One choice of an answer while it grows: token ids to text, stop strings, counts. Thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libs/tokenizer/tokenizer.h"
#include "services/gateway/generation/stop_matcher.h"
#include "services/gateway/generation/types.h"

namespace minke::gateway {

// What is new since the last one.
struct ChoiceDelta {
  std::string text;  // whole UTF-8 characters
  TokenIds token_ids;
  std::vector<TokenLogprob> logprobs;  // one per token when wanted
  std::vector<uint64_t> text_offsets;  // of each token, in characters of the choice's text
  FinishReason finish = FinishReason::kNone;
};

class Choice {
 public:
  // `tokenizer` may be null: no text then. Borrowed.
  Choice(const tokenizer::Tokenizer* tokenizer, const std::vector<std::string>& stops);

  // Text that stands before the generated one (an echoed prompt).
  void Prepend(std::string_view text);
  // Offsets of the echoed prompt's tokens. REQUIRES: Prepend not called yet.
  std::vector<uint64_t> PromptOffsets(const TokenIds& prompt) const;

  // Takes an event that is not an error. After a stop string has matched the delta is final (kStop) and what
  // the event had beyond it is dropped; the caller then cancels the sequence.
  ChoiceDelta Take(SequenceEvent event);

  bool finished() const { return finished_; }
  uint32_t completion_tokens() const { return completion_tokens_; }

 private:
  std::string Decode(uint32_t id);

  const tokenizer::Tokenizer* tokenizer_;
  std::optional<tokenizer::StreamingDecoder> decoder_;
  StopMatcher stops_;
  uint64_t characters_ = 0;  // of the text so far, held back ones included
  uint32_t completion_tokens_ = 0;
  bool finished_ = false;
};

// How logprobs name a token: its text; "bytes:\xe4..." if that is not UTF-8; "token_id:N" if it has none.
std::string TokenName(const tokenizer::Tokenizer* tokenizer, uint32_t id);

uint64_t CountCharacters(std::string_view utf8);

}  // namespace minke::gateway
