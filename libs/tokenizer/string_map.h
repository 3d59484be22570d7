// A hash map from text that is looked up by std::string_view. (Debian's Abseil has its own string_view, which
// does not convert from the standard one, so absl's default string hash cannot be used for that.)
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"

namespace minke::tokenizer {

struct StringViewHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

template <class Value>
using StringMap = absl::flat_hash_map<std::string, Value, StringViewHash, std::equal_to<>>;

}  // namespace minke::tokenizer
