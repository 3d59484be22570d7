// What a Tokenizer holds; filled by tokenizer_json.cc, used by tokenizer.cc.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "libs/tokenizer/bpe.h"
#include "libs/tokenizer/pre_tokenizer.h"
#include "libs/tokenizer/string_map.h"
#include "libs/tokenizer/tokenizer.h"

namespace minke::tokenizer {

struct Tokenizer::Impl {
  struct Entry {
    std::string bytes;
    bool exists = false;
    bool special = false;
  };
  // An added token that plain text contains: DeepSeek's ö, ü and their like, never markup
  // (docs/tokenizer.md).
  struct Literal {
    std::string content;
    uint32_t id;
  };

  std::vector<Entry> entries;                      // by id
  StringMap<uint32_t> added;                       // by content
  StringMap<uint32_t> by_bytes;                    // the vocabulary
  std::array<std::vector<Literal>, 256> literals;  // by first byte, longest first
  bool has_literals = false;
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  std::optional<Bpe> bpe;
  std::optional<uint32_t> bos_id;
  std::optional<uint32_t> eos_id;
  bool add_bos = false;

  Entry& At(uint32_t id) {
    if (id >= entries.size()) entries.resize(id + 1);
    return entries[id];
  }
  const Literal* LiteralAt(std::string_view text) const;
  absl::Status EncodePlain(std::string_view text, std::vector<uint32_t>* ids) const;
};

}  // namespace minke::tokenizer
