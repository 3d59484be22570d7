#include "cli/client_tls.h"

#include <arpa/inet.h>
#include <openssl/x509v3.h>

#include <CLI/CLI.hpp>

#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli {
namespace {

bool IsAddress(const std::string& host) {
  in6_addr any;
  return ::inet_pton(AF_INET, host.c_str(), &any) == 1 || ::inet_pton(AF_INET6, host.c_str(), &any) == 1;
}

}  // namespace

tls::Files ClientTlsFiles() { return {{"--cert"}, {"--key"}, {"--ca"}}; }

void AddClientTlsFlags(CLI::App& app, tls::Files& files) {
  app.add_option("--ca", files.ca.path, "https: the CA of the server's certificate (default: the system's)");
  app.add_option("--cert", files.certificate.path, "https: certificate to show, where the server wants one");
  app.add_option("--key", files.key.path, "its private key");
}

absl::StatusOr<Endpoint> ToEndpoint(const std::string& url, const tls::Files& files) {
  MK_ASSIGN_OR_RETURN(const Url parsed, ParseUrl(url));
  return ToEndpoint(parsed, files);
}

absl::StatusOr<Endpoint> ToEndpoint(const Url& url, const tls::Files& files) {
  if (url.tls) {
    MK_ASSIGN_OR_RETURN(const std::shared_ptr<const tls::Material> material,
                        tls::Load(files, tls::Use::kClient));
    return Endpoint{url, material->http_client};
  }
  if (files.empty()) return Endpoint{url};
  const tls::File& file = files.ca.path.empty() ? files.certificate : files.ca;
  return absl::InvalidArgumentError(
      StrCat(file.flag, ": expected an https:// address beside it, found ", url.Base()));
}

absl::StatusOr<Endpoint> ToOwnGateway(const Url& url, const std::string& certificate, tls::Files client) {
  if (!url.tls) return Endpoint{url};
  client.ca = {"--http-tls-cert", certificate};
  MK_ASSIGN_OR_RETURN(Endpoint endpoint, ToEndpoint(url, client));
  endpoint.check_name = false;
  return endpoint;
}

void SetServerName(SSL* ssl, const Endpoint& endpoint) {
  const std::string& host = endpoint.name.empty() ? endpoint.url.host : endpoint.name;
  const bool address = IsAddress(host);
  if (!address) SSL_set_tlsext_host_name(ssl, host.c_str());  // of addresses there are none
  if (!endpoint.check_name) return;
  if (address) {
    X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host.c_str());
  } else {
    SSL_set1_host(ssl, host.c_str());
  }
}

std::string HandshakeError(const SSL* ssl, const std::string& otherwise) {
  const long verified = SSL_get_verify_result(ssl);
  if (verified == X509_V_OK) return otherwise;
  return StrCat("the server's certificate is not accepted: ", X509_verify_cert_error_string(verified));
}

}  // namespace minke::cli
