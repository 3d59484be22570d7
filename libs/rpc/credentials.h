// gRPC over TLS by a tls::Identity; without one (null) in plaintext. Both sides follow the identity's files.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "libs/tls/identity.h"

namespace minke::rpc {

// Clients need a certificate if the identity has a CA. What is returned has to outlive the server, which asks
// it for the certificates of every new connection.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(std::shared_ptr<tls::Identity> identity);

// How long a client may take for the handshake, so that silent ones hold nothing.
inline constexpr int kHandshakeTimeoutMs = 10'000;

// A channel to one address. gRPC knows no new certificates for a channel that it has: this one is then made
// anew. For one thread at a time; the channels are gRPC's, thread-safe.
class SecureChannel {
 public:
  // `address`: host:port. The server's certificate has to be valid for the host, or for the identity's
  // peer_name if it has one. Does not connect.
  SecureChannel(std::string address, std::shared_ptr<tls::Identity> identity,
                grpc::ChannelArguments arguments);

  // Calls that are under way at an older one go on. Whoever keeps stubs compares: another pointer, new stubs.
  const std::shared_ptr<grpc::Channel>& Get();

 private:
  const std::string address_;
  const std::shared_ptr<tls::Identity> identity_;  // null: plaintext
  grpc::ChannelArguments arguments_;
  std::shared_ptr<const tls::Material> used_;
  std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace minke::rpc
