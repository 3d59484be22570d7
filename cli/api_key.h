// The API key that a command sends. From a file: arguments are there for everybody to see.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace minke::cli {

// The first key of a file as the gateway takes it (docs/openai_api.md), so the first word of its first line
// that is no comment; empty without a file. Errors hold nothing of the file.
absl::StatusOr<std::string> FirstKey(const std::string& path);

}  // namespace minke::cli
