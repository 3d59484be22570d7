#include "libs/tokenizer/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace minke::tokenizer {
namespace {

std::string ErrorText(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

// One per thread: allocating it for every piece of text would cost more than matching.
pcre2_match_data* ThreadMatchData() {
  thread_local const std::unique_ptr<pcre2_match_data, MatchDataDeleter> data(
      pcre2_match_data_create(1, nullptr));
  return data.get();
}

// Bytes of the white-space character that ends at `end`; 0: none. Unicode's White_Space.
size_t SpaceBefore(std::string_view text, size_t end) {
  const auto at = [&](size_t back) { return static_cast<unsigned char>(text[end - back]); };
  if (end >= 1 && (at(1) == ' ' || (at(1) >= 9 && at(1) <= 13))) return 1;
  if (end >= 2 && at(2) == 0xC2 && (at(1) == 0x85 || at(1) == 0xA0)) return 2;
  if (end < 3) return 0;
  const unsigned a = at(3), b = at(2), c = at(1);
  if (a == 0xE1 && b == 0x9A && c == 0x80) return 3;  // U+1680
  if (a == 0xE2 && b == 0x80 && (c <= 0x8A || c == 0xA8 || c == 0xA9 || c == 0xAF))
    return 3;                                         // U+2000.., 2028, 202F
  if (a == 0xE2 && b == 0x81 && c == 0x9F) return 3;  // U+205F
  if (a == 0xE3 && b == 0x80 && c == 0x80) return 3;  // U+3000
  return 0;
}

}  // namespace

struct Pattern::Code {
  pcre2_code* code = nullptr;
  bool jit = false;
  ~Code() { pcre2_code_free(code); }
};

Pattern::Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;
Pattern::~Pattern() = default;

absl::StatusOr<Pattern> Pattern::Regex(const std::string& expression) {
  if (expression.find("&&") != std::string::npos) {
    // Oniguruma intersects classes with it; PCRE2 would read two ampersands.
    return absl::InvalidArgumentError(
        absl::StrCat("\"", expression, "\": class intersection (&&) is not supported"));
  }
  Pattern pattern;
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", expression, "\" is not a pattern: ", ErrorText(error), " at offset ", offset));
  }
  pattern.code_ = std::make_unique<Code>();
  pattern.code_->code = code;
  pattern.code_->jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  pattern.trailing_space_ = expression == "\\s+$";
  return pattern;
}

Pattern Pattern::Literal(std::string text) {
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

absl::Status Pattern::FindAll(std::string_view text, std::vector<Match>* matches) const {
  if (code_ != nullptr) {
    if (!trailing_space_ || text.find('\n') != std::string_view::npos) return FindRegex(text, matches);
    // A matcher tries \s+$ from every position, which is quadratic in a long run of spaces that a caller may
    // send. Without newlines it is the white space at the end, read backwards.
    size_t begin = text.size();
    while (const size_t length = SpaceBefore(text, begin)) begin -= length;
    if (begin < text.size()) matches->push_back({begin, text.size()});
    return absl::OkStatus();
  }
  if (literal_.empty()) return absl::OkStatus();
  for (size_t at = text.find(literal_); at != std::string_view::npos;
       at = text.find(literal_, at + literal_.size())) {
    matches->push_back({at, at + literal_.size()});
  }
  return absl::OkStatus();
}

absl::Status Pattern::FindRegex(std::string_view text, std::vector<Match>* matches) const {
  pcre2_match_data* data = ThreadMatchData();
  const PCRE2_SIZE* ovector = pcre2_get_ovector_pointer(data);
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t at = 0;
  while (at < text.size()) {
    int rc = code_->jit
                 ? pcre2_jit_match(code_->code, subject, text.size(), at, 0, data, nullptr)
                 : pcre2_match(code_->code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, data, nullptr);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code_->code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                       nullptr);
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) return absl::InvalidArgumentError(absl::StrCat("text cannot be split: ", ErrorText(rc)));
    const size_t begin = ovector[0], end = ovector[1];
    if (begin >= end) {  // nothing matched here: one character on
      at = end + 1;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
      continue;
    }
    matches->push_back({begin, end});
    at = end;
  }
  return absl::OkStatus();
}

}  // namespace minke::tokenizer
