// minke bench transport: messages between two processes over UCX, and between two threads in process.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace minke::cli::bench {

struct TransportFlags {
  std::string transport = "auto";
  std::string interface = "lo";
  std::string poll = "adaptive";
  std::string sizes = "64,10k,80k,256k";
  double min_time_s = 0.5;
  std::string json;  // "-": standard output
};

void AddTransportFlags(CLI::App& app, TransportFlags& flags);
// REQUIRES: no other thread runs (it forks). The table goes to `out`, or to stderr if the JSON does.
absl::Status RunTransport(const TransportFlags& flags, const std::string& version, std::ostream& out);

}  // namespace minke::cli::bench
