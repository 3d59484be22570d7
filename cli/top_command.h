// `minke top`: the cluster's view in a terminal, once a second.
#pragma once

#include <iosfwd>
#include <string>

#include "absl/status/status.h"
#include "cli/client_tls.h"

namespace CLI {
class App;
}

namespace minke::cli {

struct TopFlags {
  std::string url = "http://127.0.0.1:8000";
  tls::Files tls = ClientTlsFiles();
  std::string api_key_file;
  bool once = false;
};

void AddTopFlags(CLI::App& app, TopFlags& flags);

// Until q, Ctrl-C or SIGTERM. With `once`, or where standard output is no terminal: one frame to `out`.
// REQUIRES: SIGINT and SIGTERM are blocked, as in main. Main thread only.
absl::Status RunTop(const TopFlags& flags, std::ostream& out);

}  // namespace minke::cli
