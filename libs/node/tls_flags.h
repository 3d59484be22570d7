// The flags of TLS that every role has: who it is to the cluster's other processes, and to etcd.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/tls/identity.h"

namespace CLI {
class App;
}
namespace minke::registry {
struct RegistryAddress;
}

namespace minke::node {

struct TlsFlags {
  tls::Files cluster{{"--tls-cert"}, {"--tls-key"}, {"--tls-ca"}};
  std::string name;  // what members' certificates are valid for; empty: the host that is dialled
  tls::Files etcd{{"--etcd-cert"}, {"--etcd-key"}, {"--etcd-ca"}};
};

// etcd: whether there is a registry that may be etcd.
void AddTlsFlags(CLI::App& app, TlsFlags& flags, bool etcd = true);
// Of the API that clients see: the gateway's, `minke up`'s and `minke serve`'s.
inline tls::Files HttpTlsFiles() {
  return {{"--http-tls-cert"}, {"--http-tls-key"}, {"--http-tls-client-ca"}};
}
void AddHttpTlsFlags(CLI::App& app, tls::Files& files);

// INVALID_ARGUMENT names a flag without what belongs beside it. Reads no file.
absl::Status CheckTls(const TlsFlags& flags, bool etcd_registry);
// Reads the files; gives the registry's address its identity and returns the cluster's, null without flags.
// Errors: of CheckTls and of tls::Load.
absl::StatusOr<std::shared_ptr<tls::Identity>> OpenTls(const TlsFlags& flags,
                                                       registry::RegistryAddress& registry);
// The same for AddHttpTlsFlags.
absl::StatusOr<std::shared_ptr<tls::Identity>> OpenHttpTls(const tls::Files& files);

}  // namespace minke::node
