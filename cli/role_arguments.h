// The command lines of the processes of a local cluster: pure functions.
#pragma once

#include <string>
#include <vector>

#include "cli/up_flags.h"

namespace minke::cli {

// Where they find each other. What is set here stays the same when a process is started again, so that the
// others find it where it was.
struct LocalAddresses {
  std::string operator_socket;  // empty: the gateway is not to use it
  std::string secret_file;
  std::string router;   // HOST:PORT, static registry: empty until the router has chosen its port
  std::string etcd;     // HOST:PORT[,...], etcd as registry
  tls::Files etcd_tls;  // at etcd; none: plaintext
  std::string http;     // HOST:PORT, as asked for, then with the port that the gateway got
};

// `experts`: to wait for before the first placement.
std::vector<std::string> RouterArguments(const UpFlags& flags, const LocalAddresses& addresses, int experts);
// `cpus`: to run on; empty: anywhere.
std::vector<std::string> ExpertArguments(const UpFlags& flags, const LocalAddresses& addresses,
                                         const std::string& cpus);
// `trace`: whether it is the one that writes --trace-file.
std::vector<std::string> AttentionArguments(const UpFlags& flags, const LocalAddresses& addresses,
                                            const std::string& cpus, bool trace);
std::vector<std::string> GatewayArguments(const UpFlags& flags, const LocalAddresses& addresses);

}  // namespace minke::cli
