// Byte-level BPE as described by a checkpoint's tokenizer.json (docs/tokenizer.md): pre-tokenizer sequences
// of Split, Digits and ByteLevel, BPE merges, added tokens. Immutable after loading; thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace minke::tokenizer {

class Tokenizer {
 public:
  // Reads `directory`/tokenizer.json and, when present, tokenizer_config.json. NOT_FOUND when there is no
  // tokenizer.json; INVALID_ARGUMENT naming file, field, expected and found otherwise.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  ~Tokenizer();

  // Text to ids, without BOS. Plain text: nothing in it becomes a special token or role marker. (Added tokens
  // that are ordinary characters, DeepSeek's ö and ü, are encoded as those tokens: docs/tokenizer.md.)
  // INVALID_ARGUMENT if `text` is not UTF-8.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text) const;

  // The bytes a token stands for; empty for ids that have no token. Added tokens: their content.
  std::string_view TokenBytes(uint32_t id) const;
  bool HasToken(uint32_t id) const;
  bool IsSpecial(uint32_t id) const;  // added token with "special": true
  std::optional<uint32_t> FindToken(
      std::string_view content) const;  // added tokens, then the vocabulary (as bytes)
  uint32_t id_end() const;              // one past the largest id

  std::optional<uint32_t> bos_id() const;
  std::optional<uint32_t> eos_id() const;
  bool add_bos() const;  // prompts of plain text begin with BOS

  struct Impl;  // tokenizer_impl.h

 private:
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns a stream of ids into text such that every piece is whole UTF-8 characters and the pieces add up to
// the text of all ids. Bytes that can never become valid UTF-8 come out as U+FFFD, one per maximal invalid
// subpart. Special tokens produce no text. Thread-compatible.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(const Tokenizer& tokenizer, bool skip_special = true);
  std::string Push(uint32_t id);
  std::string Finish();  // what is left, incomplete characters as U+FFFD

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace minke::tokenizer
