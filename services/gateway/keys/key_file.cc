#include "services/gateway/keys/key_file.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

constexpr size_t kNameMax = 64;
constexpr int64_t kLimitMax = int64_t{1} << 40;

bool GoodName(absl::string_view name) {
  return !name.empty() && name.size() <= kNameMax && std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
}

absl::Status TakeField(absl::string_view field, KeyKind kind, KeyEntry* entry) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(field, absl::MaxSplits('=', 1));
  const auto& [name, value] = parts;
  if (name == "name") {
    if (!GoodName(value)) {
      return absl::InvalidArgumentError(
          StrCat("name: expected 1 to ", kNameMax, " letters, digits, '-', '_' or '.', found '", value, "'"));
    }
    entry->name = std::string(value);
    return absl::OkStatus();
  }
  int64_t* const limit = name == "requests_per_minute" ? &entry->limits.requests_per_minute
                         : name == "tokens_per_minute" ? &entry->limits.tokens_per_minute
                         : name == "concurrency"       ? &entry->limits.concurrency
                                                       : nullptr;
  if (kind == KeyKind::kOperatorToken)
    return absl::InvalidArgumentError("expected a token and at most name=, found another field");
  if (limit == nullptr) {
    // Not what was found: it may be a part of a key.
    return absl::InvalidArgumentError(
        "expected a key, then name=, requests_per_minute=, tokens_per_minute= or concurrency=, found another "
        "field");
  }
  if (!absl::SimpleAtoi(value, limit) || *limit < 1 || *limit > kLimitMax) {
    return absl::InvalidArgumentError(
        StrCat(name, ": expected a whole number from 1 to ", kLimitMax, ", found '", value, "'"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<KeyEntry>> ParseKeys(std::string_view text, KeyKind kind) {
  const char* const what = kind == KeyKind::kApiKey ? "API key" : "operator token";
  std::vector<KeyEntry> entries;
  std::set<std::string> keys, names;
  int line_number = 0;
  for (const absl::string_view line : absl::StrSplit(AbslView(text), '\n')) {
    ++line_number;
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty() || words[0][0] == '#') continue;
    const auto bad = [&](absl::string_view why) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line_number, ": ", why));
    };
    KeyEntry entry{.key = std::string(words[0])};
    for (size_t i = 1; i < words.size(); ++i) {
      if (const absl::Status taken = TakeField(words[i], kind, &entry); !taken.ok())
        return bad(taken.message());
    }
    if (entry.name.empty()) entry.name = StrCat("key-", entries.size() + 1);
    if (!keys.insert(entry.key).second) return bad(StrCat("the same ", what, " stands on another line"));
    if (!names.insert(entry.name).second)
      return bad(StrCat("name: expected another than '", entry.name, "', which is taken"));
    entries.push_back(std::move(entry));
  }
  if (entries.empty())
    return absl::InvalidArgumentError(StrCat("expected one ", what, " per line, found none"));
  return entries;
}

}  // namespace minke::gateway
