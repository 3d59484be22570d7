// Byte-pair merges over the bytes of one piece of text. Immutable after Create; thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/tokenizer/string_map.h"

namespace minke::tokenizer {

class Bpe {
 public:
  struct Merge {
    uint32_t left, right, result;  // ids
  };
  struct Options {
    std::vector<std::pair<std::string, uint32_t>> vocab;  // bytes, id; each at most once
    std::vector<Merge> merges;                            // in order of rank
    bool ignore_merges = false;                           // a piece that is a token is that token
    int64_t unknown_id = -1;                              // for bytes that have no token; -1: an error
  };
  static absl::StatusOr<Bpe> Create(Options options);

  // Appends the ids of `piece`, in O(n log n). INVALID_ARGUMENT: a byte has no token.
  absl::Status Encode(std::string_view piece, std::vector<uint32_t>* ids) const;

 private:
  struct Ranked {
    uint32_t rank;
    uint32_t result;
  };
  Bpe() = default;
  const Ranked* Find(uint32_t left, uint32_t right) const {
    const auto found = merges_.find(static_cast<uint64_t>(left) << 32 | right);
    return found == merges_.end() ? nullptr : &found->second;
  }
  void MergeShort(std::vector<uint32_t>* symbols) const;
  void MergeLong(std::vector<uint32_t>* symbols) const;

  std::array<int64_t, 256> byte_id_{};            // -1: no token
  absl::flat_hash_map<uint64_t, Ranked> merges_;  // by left << 32 | right
  StringMap<uint32_t> whole_;                     // pieces whose encoding is known to be one token
  int64_t unknown_id_ = -1;
};

}  // namespace minke::tokenizer
