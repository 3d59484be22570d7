// Reads the fields of a JSON request body, keeping the first error. Thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nlohmann/json.hpp"
#include "services/gateway/generation/types.h"
#include "services/gateway/openai/error.h"

namespace minke::gateway {

// What a JSON value is, for messages: "a string", "the number 7". Never long, never recursive.
std::string Describe(const nlohmann::json& value);

class RequestFields {
 public:
  // REQUIRES: `object` is an object and outlives this.
  explicit RequestFields(const nlohmann::json& object) : object_(object) {}

  // The field's value; nullptr where it is absent or null.
  const nlohmann::json* Find(const char* name) const;

  // Each leaves `out` as it is where the field is absent or null, and fails on another type.
  void Number(const char* name, float* out);
  void Integer(const char* name, std::optional<int64_t>* out);
  void Bool(const char* name, bool* out);
  void String(const char* name, std::string* out);
  void TokenIdList(const char* name, uint32_t vocab_size, TokenIds* out);

  void Fail(std::string_view param, std::string_view message);
  void Expected(const char* name, std::string_view expected, const nlohmann::json& found);
  bool failed() const { return error_.has_value(); }
  std::optional<ApiError>& error() { return error_; }

 private:
  const nlohmann::json& object_;
  std::optional<ApiError> error_;
};

// An array of token ids below `vocab_size`; otherwise what is wrong with it.
std::optional<std::string> ReadTokenIds(const nlohmann::json& value, uint32_t vocab_size, TokenIds* out);

}  // namespace minke::gateway
