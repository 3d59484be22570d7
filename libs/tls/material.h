// Certificates and keys as operators name them, PEM files by flag, read and checked as a whole: what is here
// has a key that belongs to its certificate, is valid now, and is taken by OpenSSL.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

struct ssl_ctx_st;  // OpenSSL's SSL_CTX

namespace minke::tls {

struct File {
  std::string flag;  // "--tls-cert": how messages name it
  std::string path = {};
};

struct Files {
  File certificate;  // our own, then those between it and its CA
  File key;          // of our own certificate, unencrypted
  File ca;           // peers' certificates have to be signed by one of these

  bool empty() const { return certificate.path.empty() && key.path.empty() && ca.path.empty(); }
};

// What the certificate has to be good for, and which files have to be there.
enum class Use {
  kServer,  // certificate and key; with a CA clients need a certificate of it
  kClient,  // certificate and key, or neither; without a CA the system's ones are believed
  kPeer,    // both sides of one cluster: all three files
};

// INVALID_ARGUMENT names the file that is missing beside the others. Reads nothing.
absl::Status CheckComplete(const Files& files, Use use);

struct Material {
  std::string certificate, key, ca;  // the files' text
  std::string serial;                // of our certificate, in hex; empty without one
  absl::Time not_before, not_after;  // of our certificate
  // Of HTTP: TLS 1.2 or later, ALPN http/1.1. Null where the use has no such side. Shared with connections.
  std::shared_ptr<ssl_ctx_st> http_server, http_client;
};

// Blocks on the file system. NOT_FOUND: a file cannot be read; INVALID_ARGUMENT: what it holds cannot be
// used. One line that names the flag, the file, what is expected and what was found; never anything of a key.
absl::StatusOr<std::shared_ptr<const Material>> Load(const Files& files, Use use);

inline constexpr int64_t kFileBytesMax = 1 << 20;  // a system's whole bundle of CAs is a fifth of it

// The texts of the files without a check, to see whether they have changed.
struct Texts {
  std::string certificate, key, ca;
  bool operator==(const Texts&) const = default;
};
absl::StatusOr<Texts> ReadTexts(const Files& files);
absl::StatusOr<std::shared_ptr<const Material>> Parse(Texts texts, const Files& files, Use use);

}  // namespace minke::tls
