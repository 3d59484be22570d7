// Names for prefixes of token ids, the same on every host: an attention node says by them which prefixes its
// latent cache holds, and a gateway prefers the node that holds most of a prompt. Names only steer: the node
// compares the tokens themselves before it reuses anything.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace minke::cluster {

// Tokens of one cached page; a prefix is a whole number of pages.
inline constexpr int64_t kPrefixPageTokens = 64;
// The empty prefix.
inline constexpr uint64_t kEmptyPrefix = 0x9e3779b97f4a7c15;

// The prefix `before` followed by one page of tokens. The finaliser of MurmurHash3 per token: short chains of
// common ids must not collide.
inline uint64_t ExtendPrefix(uint64_t before, std::span<const uint32_t> page_tokens) {
  uint64_t h = before;
  for (const uint32_t token : page_tokens) {
    h ^= token;
    h ^= h >> 33;
    h *= 0xff51afd7ed558ccd;
    h ^= h >> 33;
    h *= 0xc4ceb9fe1a85ec53;
    h ^= h >> 33;
  }
  return h;
}

// One name per whole page of `tokens`.
inline std::vector<uint64_t> PrefixHashes(std::span<const uint32_t> tokens) {
  std::vector<uint64_t> hashes;
  uint64_t h = kEmptyPrefix;
  for (size_t end = kPrefixPageTokens; end <= tokens.size(); end += kPrefixPageTokens) {
    h = ExtendPrefix(h, tokens.subspan(end - kPrefixPageTokens, kPrefixPageTokens));
    hashes.push_back(h);
  }
  return hashes;
}

}  // namespace minke::cluster
