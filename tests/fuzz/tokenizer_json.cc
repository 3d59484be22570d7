// tokenizer.json and tokenizer_config.json of a checkpoint from anywhere, and then text through what was
// loaded. Parts: tokenizer.json, tokenizer_config.json, text.
#include <memory>
#include <vector>

#include "libs/tokenizer/chat_template.h"
#include "libs/tokenizer/tokenizer.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using minke::fuzz::kPart;
  using minke::tokenizer::Tokenizer;
  static const minke::fuzz::Folder folder;
  minke::fuzz::Input input(data, bytes);
  folder.Write("tokenizer.json", input.TakeUntil(kPart));
  const std::string_view config = input.TakeUntil(kPart);
  folder.Write("tokenizer_config.json", config.empty() ? std::string_view() : config);
  (void)minke::tokenizer::DetectChatTemplate(folder.path());
  const auto loaded = Tokenizer::Load(folder.path());
  if (!loaded.ok()) {
    FUZZ_ASSERT(!loaded.status().message().empty());
    return 0;
  }
  const Tokenizer& tokenizer = **loaded;
  for (const auto id : {tokenizer.bos_id(), tokenizer.eos_id()}) {
    if (id) FUZZ_ASSERT(tokenizer.HasToken(*id) && tokenizer.IsSpecial(*id));
  }
  FUZZ_ASSERT(!tokenizer.add_bos() || tokenizer.bos_id());
  for (const std::string_view text :
       {input.rest().substr(0, 4096), std::string_view("Hello, wörld 12345!\n\n\t 鯨 <｜User｜>")}) {
    const auto ids = tokenizer.Encode(text);
    if (!ids.ok()) continue;
    FUZZ_ASSERT(minke::fuzz::IsUtf8(text));
    minke::tokenizer::StreamingDecoder decoder(tokenizer, /*skip_special=*/false);
    std::string whole;
    for (const uint32_t id : *ids) {
      FUZZ_ASSERT(id < tokenizer.id_end() && tokenizer.HasToken(id));
      const std::string piece = decoder.Push(id);
      FUZZ_ASSERT(minke::fuzz::IsUtf8(piece));
      whole += piece;
    }
    whole += decoder.Finish();
    FUZZ_ASSERT(minke::fuzz::IsUtf8(whole));
  }
  return 0;
}
