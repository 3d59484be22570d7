// Reading fields of the tokenizer's JSON files with errors that name field, expected and found. Thread-safe.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace minke::tokenizer {

// The value as JSON, cut to a length that fits into a message.
std::string Brief(const nlohmann::json& value);

absl::StatusOr<std::string> StringField(const nlohmann::json& object, const char* name,
                                        const std::string& where);
// `fallback` where the field is absent or null.
absl::StatusOr<bool> BoolField(const nlohmann::json& object, const char* name, bool fallback,
                               const std::string& where);
// A non-negative integer below 2^24: the largest id that a vocabulary could sensibly have.
absl::StatusOr<uint32_t> TokenIdValue(const nlohmann::json& value, const std::string& where);

// A whole file as JSON. NOT_FOUND: no such file. INVALID_ARGUMENT: not JSON, or larger than 512 MiB.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path);

}  // namespace minke::tokenizer
