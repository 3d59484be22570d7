// Cuts text into the pieces that merges never cross: a tokenizer.json "pre_tokenizer" of Split, Digits and
// ByteLevel (alone or in a Sequence). Immutable after Parse; thread-safe.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace minke::tokenizer {

class PreTokenizer {
 public:
  // Pieces point into the text, or into `owned` where a prefix space was added.
  struct Pieces {
    std::vector<std::string_view> views;
    std::deque<std::string> owned;
  };

  // INVALID_ARGUMENT naming the field, expected and found.
  static absl::StatusOr<std::unique_ptr<PreTokenizer>> Parse(const nlohmann::json& pre_tokenizer);
  ~PreTokenizer();

  // Appends the pieces of `text`, none of them empty, in order.
  // REQUIRES: `text` is UTF-8. INVALID_ARGUMENT: a pattern gives up on this text (PCRE2's match limit).
  absl::Status Split(std::string_view text, Pieces* pieces) const;

 private:
  struct Stage;
  PreTokenizer();
  std::vector<std::unique_ptr<Stage>> stages_;
};

}  // namespace minke::tokenizer
