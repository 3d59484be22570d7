#include "cli/url.h"

#include "absl/strings/numbers.h"
#include "libs/base/strings.h"

namespace minke::cli {

std::string Url::HostPort() const {
  return host.find(':') == std::string::npos ? StrCat(host, ":", port) : StrCat("[", host, "]:", port);
}

std::string Url::Base() const { return StrCat(tls ? "https://" : "http://", HostPort(), path); }

absl::StatusOr<Url> ParseUrl(const std::string& url) {
  const absl::Status malformed = absl::InvalidArgumentError(
      StrCat("--url: expected http://HOST:PORT or https://HOST:PORT, found ", url));
  Url result;
  result.tls = url.rfind("https://", 0) == 0;
  if (!result.tls && url.rfind("http://", 0) != 0) return malformed;
  const size_t begin = result.tls ? 8 : 7;
  for (const char c : url) {
    if (static_cast<unsigned char>(c) <= ' ' || c == '\x7f')
      return malformed;  // would break the request's head
  }
  const size_t slash = url.find('/', begin);
  const std::string authority = url.substr(begin, slash - begin);
  if (slash != std::string::npos) result.path = url.substr(slash);
  while (!result.path.empty() && result.path.back() == '/') result.path.pop_back();

  const bool bracketed = !authority.empty() && authority.front() == '[';
  const size_t host_end = bracketed ? authority.find(']') : authority.find(':');
  if (bracketed && host_end == std::string::npos) return malformed;
  result.host = bracketed ? authority.substr(1, host_end - 1) : authority.substr(0, host_end);
  const size_t port_colon = bracketed ? host_end + 1 : host_end;
  if (port_colon >= authority.size()) {
    result.port = result.tls ? "443" : "80";
  } else {
    int port = 0;
    result.port = authority.substr(port_colon + 1);
    if (authority[port_colon] != ':' || result.port.find_first_not_of("0123456789") != std::string::npos ||
        !absl::SimpleAtoi(result.port, &port) || port < 1 || port > 65535) {
      return malformed;
    }
  }
  if (result.host.empty() || result.host.find('@') != std::string::npos) return malformed;
  return result;
}

}  // namespace minke::cli
