// GPT-2's map between bytes and printable characters. Thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "libs/base/utf8.h"

namespace minke::tokenizer {

// The character that stands for `byte` in the tokens of tokenizer.json, as UTF-8.
std::string_view ByteCharacter(uint8_t byte);
// The bytes of a token of tokenizer.json. nullopt: it has characters that stand for no byte.
std::optional<std::string> TokenToBytes(std::string_view token);

}  // namespace minke::tokenizer
