// The file of API keys, or of operator tokens: docs/openai_api.md.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "services/gateway/keys/key_account.h"

namespace minke::gateway {

struct KeyEntry {
  std::string key;
  std::string name;  // by which metrics and logs call it; unique
  KeyLimits limits;
};

enum class KeyKind { kApiKey, kOperatorToken };  // tokens have no limits

// One key per line, then its fields: name=, requests_per_minute=, tokens_per_minute=, concurrency=. Blank
// lines and lines that begin with # are skipped. Errors name the line, what was expected and found, and never
// a key.
absl::StatusOr<std::vector<KeyEntry>> ParseKeys(std::string_view text, KeyKind kind);

}  // namespace minke::gateway
