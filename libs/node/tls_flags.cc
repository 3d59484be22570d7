#include "libs/node/tls_flags.h"

#include <CLI/CLI.hpp>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/registry/registry.h"

namespace minke::node {
namespace {

absl::StatusOr<std::shared_ptr<tls::Identity>> Open(const tls::Files& files, tls::Use use,
                                                    tls::IdentityOptions options = {}) {
  if (files.empty()) return std::shared_ptr<tls::Identity>();
  return tls::Identity::Open(files, use, std::move(options));
}

}  // namespace

void AddTlsFlags(CLI::App& app, TlsFlags& flags, bool etcd) {
  app.add_option("--tls-cert", flags.cluster.certificate.path,
                 "mutual TLS between the cluster's processes, and of /metrics: this one's certificate (PEM; "
                 "read again when it changes)");
  app.add_option("--tls-key", flags.cluster.key.path, "its private key");
  app.add_option("--tls-ca", flags.cluster.ca.path, "CA of the cluster: nobody else is let in or believed");
  app.add_option("--tls-name", flags.name,
                 "name that all members' certificates are valid for (default: the host that is dialled)");
  if (!etcd) return;
  app.add_option("--etcd-ca", flags.etcd.ca.path, "TLS to etcd: the CA of its certificate");
  app.add_option("--etcd-cert", flags.etcd.certificate.path, "certificate shown to etcd");
  app.add_option("--etcd-key", flags.etcd.key.path, "its private key");
}

void AddHttpTlsFlags(CLI::App& app, tls::Files& files) {
  app.add_option("--http-tls-cert", files.certificate.path,
                 "TLS of the HTTP and gRPC API: its certificate and those up to its CA (PEM; read again when "
                 "it changes)");
  app.add_option("--http-tls-key", files.key.path, "its private key");
  app.add_option("--http-tls-client-ca", files.ca.path, "clients of the API need a certificate of this CA");
}

absl::Status CheckTls(const TlsFlags& flags, bool etcd_registry) {
  MK_RETURN_IF_ERROR(tls::CheckComplete(flags.cluster, tls::Use::kPeer));
  MK_RETURN_IF_ERROR(tls::CheckComplete(flags.etcd, tls::Use::kClient));
  if (!flags.name.empty() && flags.cluster.empty())
    return absl::InvalidArgumentError("--tls-name: expected --tls-cert beside it, found none");
  if (flags.etcd.empty()) return absl::OkStatus();
  if (flags.etcd.ca.path.empty())
    return absl::InvalidArgumentError("--etcd-cert: expected --etcd-ca beside it, found none");
  if (!etcd_registry)
    return absl::InvalidArgumentError(
        "--etcd-ca: expected --registry=etcd beside it, found --registry=static");
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<tls::Identity>> OpenTls(const TlsFlags& flags,
                                                       registry::RegistryAddress& registry) {
  MK_RETURN_IF_ERROR(CheckTls(flags, !registry.etcd.empty()));
  MK_ASSIGN_OR_RETURN(std::shared_ptr<tls::Identity> cluster,
                      Open(flags.cluster, tls::Use::kPeer, {.peer_name = flags.name}));
  registry.identity = cluster;
  if (!registry.etcd.empty()) {
    MK_ASSIGN_OR_RETURN(registry.identity, Open(flags.etcd, tls::Use::kClient));
  }
  return cluster;
}

absl::StatusOr<std::shared_ptr<tls::Identity>> OpenHttpTls(const tls::Files& files) {
  MK_RETURN_IF_ERROR(tls::CheckComplete(files, tls::Use::kServer));
  return Open(files, tls::Use::kServer);
}

}  // namespace minke::node
