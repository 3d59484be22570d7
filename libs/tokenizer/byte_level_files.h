// Tokenizer files for checkpoints that were never trained: one token per byte. Thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace minke::tokenizer {

struct ByteLevelOptions {
  uint32_t vocab_size = 512;  // rows of the model's embedding; ids past the 258 used ones have no token
  uint32_t bos_id = 0;        // as in config.json
  uint32_t eos_id = 1;
};

// Writes `directory`/tokenizer.json (the bytes 0..255 on the lowest ids that BOS and EOS leave free) and
// tokenizer_config.json with V2-Chat's template. INVALID_ARGUMENT: ids that do not fit; UNAVAILABLE: not
// writable.
absl::Status WriteByteLevelTokenizer(const std::string& directory, const ByteLevelOptions& options);

}  // namespace minke::tokenizer
