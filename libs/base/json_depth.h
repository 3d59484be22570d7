// How deep a JSON text nests. Parsing it does not recurse, but code that walks, writes or compares what was
// parsed may, as deep as a stranger's file says: look before parsing.
#pragma once

#include <string_view>

namespace minke {

// Deeper than any file or request that anybody writes.
inline constexpr int kJsonDepthMax = 64;

// Brackets outside strings, open at once; of a text that is no JSON, something.
inline bool NestsTooDeep(std::string_view json, int levels = kJsonDepthMax) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > levels) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

}  // namespace minke
