#include "libs/transport/ucx/addresses.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>

#include <charconv>
#include <cstring>
#include <memory>

#include "absl/time/clock.h"
#include "libs/base/strings.h"

namespace minke::transport::internal {
namespace {

SocketAddress Copy(const sockaddr* address) {
  SocketAddress copy;
  copy.bytes = address->sa_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
  std::memcpy(&copy.storage, address, copy.bytes);
  return copy;
}

}  // namespace

std::string SocketAddress::host() const {
  char text[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(storage).sin_addr, text, sizeof(text));
  } else {
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr, text, sizeof(text));
  }
  return text;
}

uint16_t SocketAddress::port() const {
  return ntohs(storage.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in&>(storage).sin_port
                                            : reinterpret_cast<const sockaddr_in6&>(storage).sin6_port);
}

void SetPort(SocketAddress& address, uint16_t port) {
  if (address.storage.ss_family == AF_INET) {
    reinterpret_cast<sockaddr_in&>(address.storage).sin_port = htons(port);
  } else {
    reinterpret_cast<sockaddr_in6&>(address.storage).sin6_port = htons(port);
  }
}

std::string JoinHostPort(std::string_view host, uint16_t port) {
  return host.find(':') == std::string_view::npos ? StrCat(host, ":", port) : StrCat("[", host, "]:", port);
}

absl::StatusOr<Interface> FindInterface(std::string_view name_or_address) {
  ifaddrs* raw = nullptr;
  if (getifaddrs(&raw) != 0) return absl::UnavailableError(StrCat("getifaddrs: ", std::strerror(errno)));
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> all(raw, &freeifaddrs);

  std::string known;
  Interface found;
  bool not_yet = false;  // it is there by name, but not running
  for (const ifaddrs* entry = raw; entry != nullptr; entry = entry->ifa_next) {
    constexpr unsigned kRunning = IFF_UP | IFF_RUNNING;
    not_yet |= name_or_address == entry->ifa_name;
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & kRunning) != kRunning) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const SocketAddress address = Copy(entry->ifa_addr);
    StrAppend(&known, known.empty() ? "" : ", ", std::string_view(entry->ifa_name), " (", address.host(),
              ")");
    const bool by_name = name_or_address == entry->ifa_name;
    const bool by_address = name_or_address == address.host();
    // By name: the first IPv4 address, or else the first.
    const bool better =
        found.name.empty() || (family == AF_INET && found.address.storage.ss_family != AF_INET);
    if (by_address || (by_name && better)) {
      found = {entry->ifa_name, address, (entry->ifa_flags & IFF_LOOPBACK) != 0};
      if (by_address) break;
    }
  }
  if (found.name.empty() && not_yet) {
    return absl::UnavailableError(StrCat("interface \"", name_or_address,
                                         "\": expected one that runs and has an address, found one that does "
                                         "not (yet)"));
  }
  if (found.name.empty()) {
    return absl::InvalidArgumentError(StrCat("interface \"", name_or_address, "\": expected one of ", known));
  }
  return found;
}

absl::StatusOr<Interface> AwaitInterface(std::string_view name_or_address, absl::Duration timeout) {
  const absl::Time end = absl::Now() + timeout;
  while (true) {
    absl::StatusOr<Interface> found = FindInterface(name_or_address);
    if (!absl::IsUnavailable(found.status()) || absl::Now() >= end) return found;
    absl::SleepFor(absl::Milliseconds(50));
  }
}

absl::StatusOr<SocketAddress> ResolveHostPort(std::string_view address) {
  const size_t colon = address.rfind(':');
  std::string_view host = address.substr(0, colon == std::string_view::npos ? 0 : colon);
  const std::string_view port_text = colon == std::string_view::npos ? "" : address.substr(colon + 1);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  uint16_t port = 0;
  const auto [end, error] = std::from_chars(port_text.data(), port_text.data() + port_text.size(), port);
  if (host.empty() || (!bracketed && host.find(':') != std::string_view::npos) || error != std::errc() ||
      end != port_text.data() + port_text.size() || port == 0) {
    return absl::InvalidArgumentError(StrCat("address: expected host:port, found \"", address, "\""));
  }
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* raw = nullptr;
  if (const int code = getaddrinfo(std::string(host).c_str(), nullptr, &hints, &raw); code != 0) {
    return absl::UnavailableError(StrCat("address ", address, ": ", std::string_view(gai_strerror(code))));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> all(raw, &freeaddrinfo);
  const addrinfo* chosen = raw;
  for (const addrinfo* entry = raw; entry != nullptr; entry = entry->ai_next) {
    if (entry->ai_family == AF_INET) {
      chosen = entry;
      break;
    }
  }
  SocketAddress resolved = Copy(chosen->ai_addr);
  SetPort(resolved, port);
  return resolved;
}

}  // namespace minke::transport::internal
