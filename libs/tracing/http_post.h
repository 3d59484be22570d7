// One POST to a collector, with a deadline.
#pragma once

#include <chrono>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minke::tracing {

struct HttpEndpoint {
  std::string host, port, path;
};

// http://HOST[:PORT][/path], port 4318 by default; INVALID_ARGUMENT says what was expected and found.
absl::StatusOr<HttpEndpoint> ParseEndpoint(const std::string& url);

// `timeout`: for everything, from resolving the name to the last byte of the answer. UNAVAILABLE: nobody
// answered, or with 429, 502, 503 or 504, which are worth another try; INVALID_ARGUMENT: any other answer
// but 2xx.
absl::Status Post(const HttpEndpoint& endpoint, std::string_view content_type, std::string body,
                  std::chrono::milliseconds timeout);

}  // namespace minke::tracing
