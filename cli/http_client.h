// A small blocking HTTP/1.1 client, with TLS or without, for the command line: health checks and server-sent
// events.
#pragma once

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/client_tls.h"

namespace minke::cli {

struct HttpAnswer {
  int status = 0;
  std::string body;
};
// `timeout`: to connect, and between two pieces of the answer. `api_key`: empty for none.
absl::StatusOr<HttpAnswer> HttpGet(const Endpoint& endpoint, const std::string& target,
                                   absl::Duration timeout, const std::string& api_key = "");
// The message of an OpenAI error object, or the text itself.
std::string ErrorText(const std::string& body);

// POSTs JSON and hands over each "data:" line of a 200 answer as it arrives; returning false ends the stream.
// Another status: its body as the error's text. `silence_max`: between two pieces of the answer.
absl::Status HttpPostEvents(const Endpoint& endpoint, const std::string& target, const std::string& json,
                            const std::string& api_key, absl::Duration silence_max,
                            absl::FunctionRef<bool(const std::string&)> on_data);

}  // namespace minke::cli
