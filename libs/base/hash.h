// FNV-1a, 64 bits: names that differ get numbers that differ, the same on every machine. Not for secrets.
#pragma once

#include <cstdint>
#include <string_view>

namespace minke {

inline constexpr uint64_t kFnvStart = 0xcbf29ce484222325ull;

// Goes on from `hash`, so that several texts can be mixed.
constexpr uint64_t Fnv1a(std::string_view text, uint64_t hash = kFnvStart) {
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return hash;
}

}  // namespace minke
