#include "services/gateway/http/api_keys.h"

#include <fstream>

#include "absl/strings/ascii.h"
#include "libs/base/status.h"

namespace minke::gateway {
namespace {

// Looks at every byte of `key`, whatever `candidate` is.
bool EqualInConstantTime(std::string_view key, std::string_view candidate) {
  size_t difference = key.size() ^ candidate.size();
  for (size_t i = 0; i < key.size(); ++i) {
    const char other = candidate.empty() ? '\0' : candidate[i % candidate.size()];
    difference |= static_cast<unsigned char>(key[i] ^ other);
  }
  return difference == 0;
}

}  // namespace

absl::StatusOr<ApiKeys> ApiKeys::Load(const std::string& path, std::string_view what) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(StrCat(path, ": the ", what, " file cannot be read"));
  ApiKeys result;
  std::string line;
  while (std::getline(file, line)) {
    const absl::string_view key = absl::StripAsciiWhitespace(line);
    if (!key.empty() && key[0] != '#') result.keys_.emplace_back(key);
  }
  if (result.keys_.empty())
    return absl::InvalidArgumentError(StrCat(path, ": expected one ", what, " per line, found none"));
  return result;
}

bool ApiKeys::Allows(std::string_view authorization) const {
  if (!required()) return true;
  constexpr std::string_view kScheme = "bearer ";
  bool is_bearer = authorization.size() > kScheme.size();
  for (size_t i = 0; is_bearer && i < kScheme.size(); ++i)
    is_bearer = absl::ascii_tolower(authorization[i]) == kScheme[i];
  if (!is_bearer) return false;
  const std::string_view candidate =
      StdView(absl::StripAsciiWhitespace(AbslView(authorization.substr(kScheme.size()))));
  bool allowed = false;
  for (const std::string& key : keys_) allowed = EqualInConstantTime(key, candidate) | allowed;
  return allowed;
}

}  // namespace minke::gateway
