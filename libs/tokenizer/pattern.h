// A pattern of a Split rule: a regular expression (PCRE2 with Unicode classes) or a literal string.
// Immutable after creation; thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minke::tokenizer {

struct Match {
  size_t begin;
  size_t end;
};

class Pattern {
 public:
  // `expression` follows Oniguruma's dialect as tokenizer.json files use it: `$` also matches before a
  // newline.
  static absl::StatusOr<Pattern> Regex(const std::string& expression);
  static Pattern Literal(std::string text);
  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;
  ~Pattern();

  // Appends all matches that are not empty, left to right, not overlapping. REQUIRES: `text` is UTF-8.
  absl::Status FindAll(std::string_view text, std::vector<Match>* matches) const;

 private:
  struct Code;
  Pattern();
  absl::Status FindRegex(std::string_view text, std::vector<Match>* matches) const;
  std::unique_ptr<Code> code_;  // null: literal
  std::string literal_;
  bool trailing_space_ = false;  // the expression is \s+$
};

}  // namespace minke::tokenizer
