#include "libs/tokenizer/byte_level_files.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;

constexpr char kBos[] = "<｜begin▁of▁sentence｜>";
constexpr char kEos[] = "<｜end▁of▁sentence｜>";
constexpr char kV2ChatTemplate[] =
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

absl::Status WriteFile(const std::string& path, const json& value) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << value.dump(1) << "\n";
  file.close();
  return file ? absl::OkStatus() : absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
}

json SpecialToken(uint32_t id, const char* content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

}  // namespace

absl::Status WriteByteLevelTokenizer(const std::string& directory, const ByteLevelOptions& options) {
  if (options.bos_id == options.eos_id || options.bos_id >= options.vocab_size ||
      options.eos_id >= options.vocab_size || options.vocab_size < 258) {
    return absl::InvalidArgumentError(
        absl::StrCat("byte-level tokenizer: expected vocab_size >= 258 (256 bytes, BOS, EOS) and two "
                     "different ids inside it, found "
                     "vocab_size ",
                     options.vocab_size, ", BOS ", options.bos_id, ", EOS ", options.eos_id));
  }
  json vocab = json::object();
  uint32_t id = 0;
  for (int byte = 0; byte < 256; ++byte, ++id) {
    while (id == options.bos_id || id == options.eos_id) ++id;
    vocab[std::string(ByteCharacter(static_cast<uint8_t>(byte)))] = id;
  }
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  const json tokenizer = {
      {"version", "1.0"},
      {"added_tokens", {SpecialToken(options.bos_id, kBos), SpecialToken(options.eos_id, kEos)}},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", nullptr},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"byte_fallback", false}, {"vocab", vocab}, {"merges", json::array()}}}};
  const json config = {{"add_bos_token", true},
                       {"add_eos_token", false},
                       {"bos_token", kBos},
                       {"eos_token", kEos},
                       {"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"chat_template", kV2ChatTemplate}};
  MK_RETURN_IF_ERROR(WriteFile(absl::StrCat(directory, "/tokenizer.json"), tokenizer));
  return WriteFile(absl::StrCat(directory, "/tokenizer_config.json"), config);
}

}  // namespace minke::tokenizer
