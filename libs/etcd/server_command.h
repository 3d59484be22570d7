// How to start an etcd of one's own on this machine: for `minke up` and for tests.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/tls/material.h"

namespace minke::etcd {

// Path of the etcd in PATH. NOT_FOUND says how to get one.
absl::StatusOr<std::string> FindServer();

// A TCP port of 127.0.0.1 that nobody listens on at the moment.
absl::StatusOr<int> FreePort();

// A cluster of one on loopback, with its data in `directory`. It keeps ten minutes of history. With files, as
// those of tls::Use::kPeer, clients need a certificate of the CA; etcd reads them again for every connection.
std::vector<std::string> ServerArguments(const std::string& directory, int client_port, int peer_port,
                                         const tls::Files& files = {});

}  // namespace minke::etcd
