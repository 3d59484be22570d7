// UTF-8 one character at a time. Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace minke {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Kind {
  kCharacter,   // a whole character of `length` bytes
  kInvalid,     // a maximal subpart of `length` bytes that can never become one (Unicode 15, section 3.9)
  kIncomplete,  // all that is left, and the beginning of a character
};
struct Utf8Step {
  Utf8Kind kind;
  int length;
  uint32_t code_point;  // of kCharacter
};

// REQUIRES: `bytes` is not empty.
Utf8Step NextUtf8(std::string_view bytes);

// Bytes of `text` before the first one that is not part of a whole character; text.size() if it is UTF-8.
size_t ValidUtf8Prefix(std::string_view text);

void AppendUtf8(uint32_t code_point, std::string* out);

}  // namespace minke
