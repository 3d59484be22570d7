// An answer that is an error: HTTP status and OpenAI's error object. Plain values.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace minke::gateway {

struct ApiError {
  int http_status = 400;
  std::string message;
  std::string param;      // empty: null
  std::string code;       // empty: null
  int retry_after_s = 0;  // 0: no Retry-After
};

// 400 naming the field that is wrong.
ApiError BadField(std::string_view param, std::string_view message, std::string_view code = "");

// The error a status of the cluster becomes: RESOURCE_EXHAUSTED 429, UNAVAILABLE 503 (both with Retry-After),
// INVALID_ARGUMENT 400, anything else 500.
ApiError FromStatus(const absl::Status& status);
// The other way, for the gRPC API. Never OK.
absl::Status ToStatus(const ApiError& error);

// {"error":{"message":...,"type":...,"param":...,"code":...}}
std::string ErrorBody(const ApiError& error);

}  // namespace minke::gateway
