// Chat messages from a hostile user. Parts are messages, their first byte the role; the first byte of all
// chooses the template. Text never becomes a special token: the prompt has as many of them as the template
// puts there, and between them the messages' own bytes.
#include "libs/tokenizer/chat_template.h"

#include <memory>
#include <vector>

#include "tests/fuzz/fuzz.h"

namespace {

using minke::tokenizer::ChatMessage;
using minke::tokenizer::ChatTemplate;
using minke::tokenizer::Tokenizer;

// The DeepSeek-style test tokenizer, with the role tokens of the newer templates if it lacks them.
const Tokenizer& TheTokenizer() {
  static const std::unique_ptr<Tokenizer> tokenizer = [] {
    auto loaded = Tokenizer::Load("libs/tokenizer/testdata/deepseek_style");
    FUZZ_ASSERT(loaded.ok() && (*loaded)->bos_id() && (*loaded)->eos_id());
    return *std::move(loaded);
  }();
  return *tokenizer;
}

// Tokens that only a template may put into a prompt.
bool IsMarker(const Tokenizer& tokenizer, uint32_t id) {
  return tokenizer.IsSpecial(id) || id == tokenizer.FindToken("<｜User｜>") ||
         id == tokenizer.FindToken("<｜Assistant｜>");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using minke::fuzz::kPart;
  minke::fuzz::Input input(data, bytes);
  const auto chat_template = static_cast<ChatTemplate>(input.Take<uint8_t>() % 3);
  const Tokenizer& tokenizer = TheTokenizer();
  static const char* const kRoles[] = {"system", "user", "assistant"};
  std::vector<ChatMessage> messages;
  size_t users = 0, assistants = 0;
  bool utf8 = true;
  while (!input.empty() && messages.size() < 64) {
    const size_t role = input.Take<uint8_t>() % 3;
    messages.push_back({kRoles[role], std::string(input.TakeUntil(kPart))});
    users += role == 1, assistants += role == 2;
    utf8 = utf8 && minke::fuzz::IsUtf8(messages.back().content);
  }
  const auto ids = RenderChat(tokenizer, chat_template, messages);
  if (!ids.ok()) {
    FUZZ_ASSERT(messages.empty() || !utf8 || chat_template != ChatTemplate::kV2Chat);
    return 0;
  }
  // In V2.5 only the last system message counts, so only that one has to be text.
  FUZZ_ASSERT(utf8 || chat_template == ChatTemplate::kV2_5);
  size_t markers = 0;
  std::string text;
  for (const uint32_t id : *ids) {
    FUZZ_ASSERT(id < tokenizer.id_end() && tokenizer.HasToken(id));
    if (IsMarker(tokenizer, id)) {
      ++markers;
    } else {
      text += tokenizer.TokenBytes(id);
    }
  }
  const size_t roles = chat_template == ChatTemplate::kV2Chat ? 0 : users + assistants + 1;
  FUZZ_ASSERT(markers == 1 + assistants + roles);
  size_t at = 0;
  for (const ChatMessage& message : messages) {
    if (chat_template == ChatTemplate::kV2_5 && message.role == "system") continue;
    at = text.find(message.content, at);
    FUZZ_ASSERT(at != std::string::npos);
    at += message.content.size();
  }
  return 0;
}
