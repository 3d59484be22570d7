// Addresses as people type them after --url.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace minke::cli {

struct Url {
  std::string host, port;
  std::string path = {};  // "" or "/..." without a slash at its end
  bool tls = false;       // https

  // As a Host header and messages want it; IPv6 gets its brackets back.
  std::string HostPort() const;
  std::string Base() const;  // "https://HOST:PORT/PATH"
};
// "http[s]://HOST[:PORT][/PATH]", HOST an IPv6 address in brackets too; INVALID_ARGUMENT otherwise.
absl::StatusOr<Url> ParseUrl(const std::string& url);

}  // namespace minke::cli
