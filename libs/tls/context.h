// Inside of libs/tls: OpenSSL's contexts of HTTP connections.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "libs/tls/openssl.h"

namespace minke::tls {

// Borrowed for the call. Null and empty: none.
struct ContextParts {
  std::span<const CertificatePtr> chain;  // ours first
  EVP_PKEY* key = nullptr;
  std::span<const CertificatePtr> ca;
};

// Clients need a certificate of a CA if there is one.
absl::StatusOr<std::shared_ptr<SSL_CTX>> MakeHttpServerContext(const ContextParts& parts);
// Believes the CAs, else the system's. Names are the connection's to check.
absl::StatusOr<std::shared_ptr<SSL_CTX>> MakeHttpClientContext(const ContextParts& parts);

}  // namespace minke::tls
