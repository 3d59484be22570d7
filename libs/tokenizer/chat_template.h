// Chat messages to token ids. The templates of DeepSeek-V2-Chat, V2-Chat-0628 and V2.5 are built in
// (docs/tokenizer.md); a checkpoint's tokenizer_config.json says which one it was trained with. Message text
// is encoded as plain text, so it can never inject a special token.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/tokenizer/tokenizer.h"

namespace minke::tokenizer {

enum class ChatTemplate { kV2Chat, kV2Chat0628, kV2_5 };

struct ChatMessage {
  std::string role;  // system, user, assistant
  std::string content;
};

// "v2-chat", "v2-chat-0628", "v2.5"
absl::StatusOr<ChatTemplate> ParseChatTemplate(std::string_view name);

// Chosen by features of tokenizer_config.json's chat_template text. NOT_FOUND: no tokenizer_config.json or no
// chat_template in it. INVALID_ARGUMENT: none of the three.
absl::StatusOr<ChatTemplate> DetectChatTemplate(const std::string& checkpoint_directory);

// BOS, the messages, the generation prompt. INVALID_ARGUMENT: no messages, an unknown role, a template token
// that the tokenizer lacks, text that is not UTF-8.
absl::StatusOr<std::vector<uint32_t>> RenderChat(const Tokenizer& tokenizer, ChatTemplate chat_template,
                                                 const std::vector<ChatMessage>& messages);

}  // namespace minke::tokenizer
