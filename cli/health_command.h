// `minke health`: whether a gateway or a member can serve, as an exit code; for probes that cannot speak TLS.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "cli/client_tls.h"

namespace CLI {
class App;
}

namespace minke::cli {

struct HealthFlags {
  std::string url;   // what has to be there (200); without a path /health, a gateway's
  std::string grpc;  // or HOST:PORT of any member's gRPC server: grpc.health.v1
  std::string name;  // what the certificate has to be valid for; empty: the host
  std::string pin;   // file of the certificate that the server has to show, whatever its name
  tls::Files tls = ClientTlsFiles();
  int timeout_s = 3;
};

void AddHealthFlags(CLI::App& app, HealthFlags& flags);
// OK: it serves. UNAVAILABLE: it does not; one line says why.
absl::Status RunHealth(const HealthFlags& flags);

}  // namespace minke::cli
