#include "services/gateway/openai/error.h"

#include "libs/base/strings.h"
#include "services/gateway/openai/json_writer.h"

namespace minke::gateway {
namespace {

constexpr int kRetryAfterSeconds = 1;

const char* TypeOf(int http_status) {
  switch (http_status) {
    case 429:
      return "rate_limit_error";
    case 503:
      return "service_unavailable_error";
    default:
      return http_status >= 500 ? "server_error" : "invalid_request_error";
  }
}

}  // namespace

ApiError BadField(std::string_view param, std::string_view message, std::string_view code) {
  return {400, std::string(message), std::string(param), std::string(code), 0};
}

ApiError FromStatus(const absl::Status& status) {
  const std::string message(StdView(status.message()));
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return {400, message, "", "", 0};
    case absl::StatusCode::kNotFound:
      return {404, message, "", "", 0};
    case absl::StatusCode::kResourceExhausted:
      return {429, message, "", "overloaded", kRetryAfterSeconds};
    case absl::StatusCode::kUnavailable:
      return {503, message, "", "unavailable", kRetryAfterSeconds};
    case absl::StatusCode::kDeadlineExceeded:
      return {504, message, "", "deadline_exceeded", 0};
    default:
      return {500, message, "", "internal_error", 0};
  }
}

absl::Status ToStatus(const ApiError& error) {
  const std::string message = error.param.empty() ? error.message : StrCat(error.param, ": ", error.message);
  switch (error.http_status) {
    case 401:
      return absl::UnauthenticatedError(message);
    case 404:
      return absl::NotFoundError(message);
    case 429:
      return absl::ResourceExhaustedError(message);
    case 503:
      return absl::UnavailableError(message);
    case 504:
      return absl::DeadlineExceededError(message);
    default:
      return error.http_status >= 500 ? absl::InternalError(message) : absl::InvalidArgumentError(message);
  }
}

std::string ErrorBody(const ApiError& error) {
  std::string body;
  JsonWriter json(&body);
  const auto text_or_null = [&json](const char* key, const std::string& text) {
    json.Key(key);
    if (text.empty()) {
      json.Null();
    } else {
      json.String(text);
    }
  };
  json.BeginObject();
  json.Key("error");
  json.BeginObject();
  json.Key("message").String(error.message);
  json.Key("type").String(TypeOf(error.http_status));
  text_or_null("param", error.param);
  text_or_null("code", error.code);
  json.EndObject();
  json.EndObject();
  return body;
}

}  // namespace minke::gateway
