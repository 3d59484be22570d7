// The keys that callers may use. Immutable after loading; thread-safe.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace minke::gateway {

class ApiKeys {
 public:
  ApiKeys() = default;  // no keys: everybody may call
  // One key per line (`what` they are, for messages); blank lines and lines that begin with # are skipped. An
  // error if the file cannot be read or has no key: a server that was meant to be closed must not open.
  static absl::StatusOr<ApiKeys> Load(const std::string& path, std::string_view what = "API key");

  bool required() const { return !keys_.empty(); }
  // `authorization` is the header's value, "Bearer KEY". Takes the same time whichever key it is, and however
  // much of it is right.
  bool Allows(std::string_view authorization) const;

 private:
  std::vector<std::string> keys_;
};

}  // namespace minke::gateway
