// Interfaces and socket addresses as UCX wants them.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace minke::transport::internal {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t bytes = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  std::string host() const;
  uint16_t port() const;
};

// "host:port", "[v6]:port".
std::string JoinHostPort(std::string_view host, uint16_t port);

struct Interface {
  std::string name;
  SocketAddress address;  // IPv4 if it has one, or the one that was asked for; port not set
  bool loopback = false;
};
// By name or by address. INVALID_ARGUMENT lists what there is; UNAVAILABLE: it is there, but does not run or
// has no address.
absl::StatusOr<Interface> FindInterface(std::string_view name_or_address);
// The same, while it is UNAVAILABLE for at most `timeout`.
absl::StatusOr<Interface> AwaitInterface(std::string_view name_or_address, absl::Duration timeout);

// "host:port" to a socket address; host may be a name. INVALID_ARGUMENT: malformed. UNAVAILABLE: does not
// resolve.
absl::StatusOr<SocketAddress> ResolveHostPort(std::string_view address);

void SetPort(SocketAddress& address, uint16_t port);

}  // namespace minke::transport::internal
