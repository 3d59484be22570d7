#include "services/gateway/generation/choice.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"
#include "libs/base/utf8.h"

namespace minke::gateway {

Choice::Choice(const tokenizer::Tokenizer* tokenizer, const std::vector<std::string>& stops)
    : tokenizer_(tokenizer), stops_(stops) {
  if (tokenizer != nullptr) decoder_.emplace(*tokenizer);
}

void Choice::Prepend(std::string_view text) { characters_ += CountCharacters(text); }

std::vector<uint64_t> Choice::PromptOffsets(const TokenIds& prompt) const {
  std::vector<uint64_t> offsets;
  offsets.reserve(prompt.size());
  std::optional<tokenizer::StreamingDecoder> decoder;
  if (tokenizer_ != nullptr) decoder.emplace(*tokenizer_);
  uint64_t at = 0;
  for (const uint32_t id : prompt) {
    offsets.push_back(at);
    if (decoder) at += CountCharacters(decoder->Push(id));
  }
  return offsets;
}

ChoiceDelta Choice::Take(SequenceEvent event) {
  ChoiceDelta delta;
  if (finished_) return delta;
  delta.logprobs.reserve(event.logprobs.size());
  for (size_t i = 0; i < event.token_ids.size() && !stops_.matched(); ++i) {
    const uint32_t id = event.token_ids[i];
    delta.token_ids.push_back(id);
    delta.text_offsets.push_back(characters_);
    if (i < event.logprobs.size()) delta.logprobs.push_back(std::move(event.logprobs[i]));
    ++completion_tokens_;
    // The token that stopped the sequence is the last one, and never part of the text.
    const bool is_stop_token = event.finish == FinishReason::kStop && i + 1 == event.token_ids.size();
    if (decoder_ && !is_stop_token) {
      const std::string text = decoder_->Push(id);
      characters_ += CountCharacters(text);
      delta.text += stops_.Push(text);
    }
  }
  delta.finish = event.finish;
  if (event.finish != FinishReason::kNone && decoder_ && !stops_.matched())
    delta.text += stops_.Push(decoder_->Finish());
  if (stops_.matched()) delta.finish = FinishReason::kStop;
  if (delta.finish != FinishReason::kNone) {
    delta.text += stops_.Finish();
    finished_ = true;
  }
  return delta;
}

std::string TokenName(const tokenizer::Tokenizer* tokenizer, uint32_t id) {
  if (tokenizer == nullptr || !tokenizer->HasToken(id)) return StrCat("token_id:", id);
  const std::string_view bytes = tokenizer->TokenBytes(id);
  if (ValidUtf8Prefix(bytes) == bytes.size()) return std::string(bytes);
  std::string name = "bytes:";
  for (const char byte : bytes) absl::StrAppendFormat(&name, "\\x%02x", static_cast<uint8_t>(byte));
  return name;
}

uint64_t CountCharacters(std::string_view utf8) {
  return static_cast<uint64_t>(std::count_if(
      utf8.begin(), utf8.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; }));
}

}  // namespace minke::gateway
