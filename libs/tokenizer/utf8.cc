#include "libs/tokenizer/utf8.h"

#include <array>

namespace minke::tokenizer {
namespace {

// Printable Latin-1 characters stand for their own byte, the other bytes for U+0100 and up, in order.
struct ByteMap {
  std::array<std::string, 256> character;
  std::array<int16_t, 0x144>
      byte;  // by code point; -1: none. 256 bytes less 188 printable ones: U+0100..U+0143

  ByteMap() {
    byte.fill(-1);
    uint32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      const uint32_t code_point = printable ? b : next++;
      AppendUtf8(code_point, &character[b]);
      byte[code_point] = static_cast<int16_t>(b);
    }
  }
};

const ByteMap& Map() {
  static const ByteMap map;
  return map;
}

}  // namespace

std::string_view ByteCharacter(uint8_t byte) { return Map().character[byte]; }

std::optional<std::string> TokenToBytes(std::string_view token) {
  const ByteMap& map = Map();
  std::string bytes;
  while (!token.empty()) {
    const Utf8Step step = NextUtf8(token);
    if (step.kind != Utf8Kind::kCharacter || step.code_point >= map.byte.size() ||
        map.byte[step.code_point] < 0) {
      return std::nullopt;
    }
    bytes.push_back(static_cast<char>(map.byte[step.code_point]));
    token.remove_prefix(step.length);
  }
  return bytes;
}

}  // namespace minke::tokenizer
