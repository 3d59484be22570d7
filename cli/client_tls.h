// How commands speak to https:// addresses.
#pragma once

#include <openssl/ssl.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cli/url.h"
#include "libs/tls/material.h"

namespace CLI {
class App;
}

namespace minke::cli {

// --ca, --cert and --key, relative to what a command talks to.
tls::Files ClientTlsFiles();
void AddClientTlsFlags(CLI::App& app, tls::Files& files);

// Where requests go. Copies share the context.
struct Endpoint {
  Url url;
  std::shared_ptr<SSL_CTX> tls = nullptr;  // of https
  bool check_name = true;                  // false: whoever has a certificate that is believed is the one
  std::string name = {};                   // what the certificate has to be valid for; empty: url.host
};
// INVALID_ARGUMENT for flags beside an http:// address; errors of tls::Load.
absl::StatusOr<Endpoint> ToEndpoint(const std::string& url, const tls::Files& files);
absl::StatusOr<Endpoint> ToEndpoint(const Url& url, const tls::Files& files);

// A gateway of our own: the certificate it was told to show is the one that is believed, whatever its name.
// `client`: the certificate to show it and its key, if it wants one.
absl::StatusOr<Endpoint> ToOwnGateway(const Url& url, const std::string& certificate, tls::Files client);

// For a connection to the endpoint, before its handshake: the name that is asked for and has to be shown.
void SetServerName(SSL* ssl, const Endpoint& endpoint);
// Why the handshake failed, if it was the server's certificate, else `otherwise`.
std::string HandshakeError(const SSL* ssl, const std::string& otherwise);

}  // namespace minke::cli
