#include "libs/tls/context.h"

#include <cstring>
#include <string_view>

#include "libs/base/status.h"

namespace minke::tls {
namespace {

constexpr unsigned char kHttp11[] = {8, 'h', 't', 't', 'p', '/', '1', '.', '1'};

// A client that offers protocols, and HTTP/1.1 not among them, would not understand us.
int SelectHttp11(SSL*, const unsigned char** out, unsigned char* out_length, const unsigned char* offered,
                 unsigned int offered_length, void*) {
  unsigned char* chosen = nullptr;
  if (SSL_select_next_proto(&chosen, out_length, kHttp11, sizeof kHttp11, offered, offered_length) !=
      OPENSSL_NPN_NEGOTIATED) {
    return SSL_TLSEXT_ERR_ALERT_FATAL;
  }
  *out = chosen;
  return SSL_TLSEXT_ERR_OK;
}

absl::Status Failed() { return absl::InvalidArgumentError(TakeError()); }

absl::StatusOr<std::shared_ptr<SSL_CTX>> MakeContext(const SSL_METHOD* method, const ContextParts& parts) {
  ERR_clear_error();
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(method), SSL_CTX_free);
  if (context == nullptr) return Failed();
  SSL_CTX* const raw = context.get();
  SSL_CTX_set_min_proto_version(raw, TLS1_2_VERSION);
  // Of TLS 1.2 only what has forward secrecy and authenticates what it encrypts, as all of 1.3 does.
  if (SSL_CTX_set_cipher_list(raw, "ECDHE+AESGCM:ECDHE+CHACHA20") != 1) return Failed();
  SSL_CTX_set_options(raw, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  // Thousands of idle streams: 34 KB each are given back between records.
  SSL_CTX_set_mode(
      raw, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  for (size_t i = 0; i < parts.chain.size(); ++i) {
    const bool taken = i == 0 ? SSL_CTX_use_certificate(raw, parts.chain[i].get()) == 1
                              : SSL_CTX_add1_chain_cert(raw, parts.chain[i].get()) == 1;
    if (!taken) return Failed();
  }
  if (parts.key != nullptr && SSL_CTX_use_PrivateKey(raw, parts.key) != 1) return Failed();
  for (const CertificatePtr& ca : parts.ca) {
    if (X509_STORE_add_cert(SSL_CTX_get_cert_store(raw), ca.get()) != 1) return Failed();
  }
  return context;
}

}  // namespace

absl::StatusOr<std::shared_ptr<SSL_CTX>> MakeHttpServerContext(const ContextParts& parts) {
  MK_ASSIGN_OR_RETURN(std::shared_ptr<SSL_CTX> context, MakeContext(TLS_server_method(), parts));
  SSL_CTX_set_alpn_select_cb(context.get(), SelectHttp11, nullptr);
  // A session belongs to the context that made it: one that replaces it, with another CA, resumes none.
  constexpr unsigned char kSessions[] = "minke";
  SSL_CTX_set_session_id_context(context.get(), kSessions, sizeof kSessions - 1);
  if (!parts.ca.empty()) {
    SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    for (const CertificatePtr& ca : parts.ca) SSL_CTX_add_client_CA(context.get(), ca.get());
  }
  return context;
}

absl::StatusOr<std::shared_ptr<SSL_CTX>> MakeHttpClientContext(const ContextParts& parts) {
  MK_ASSIGN_OR_RETURN(std::shared_ptr<SSL_CTX> context, MakeContext(TLS_client_method(), parts));
  SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER, nullptr);
  // Whoever is named is believed, also where it is no root: a server's own certificate can stand for itself.
  X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(context.get()), X509_V_FLAG_PARTIAL_CHAIN);
  if (SSL_CTX_set_alpn_protos(context.get(), kHttp11, sizeof kHttp11) != 0) return Failed();
  if (parts.ca.empty() && SSL_CTX_set_default_verify_paths(context.get()) != 1) return Failed();
  return context;
}

}  // namespace minke::tls
