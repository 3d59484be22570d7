// `minke chat`: a conversation in a terminal; and the one completion that `minke demo` streams.
#pragma once

#include <iosfwd>
#include <string>

#include "absl/status/status.h"
#include "cli/client_tls.h"

namespace minke::cli {

struct ChatFlags {
  std::string url = "http://127.0.0.1:8000";
  tls::Files tls = ClientTlsFiles();
  std::string api_key_file;
  std::string system;
  double temperature = 0.7;
  double top_p = 0.95;
  int max_tokens = 512;
};

// Reads a message per line from `in` until its end, streams each answer to `out`.
absl::Status RunChat(const ChatFlags& flags, std::istream& in, std::ostream& out);

// Streams one completion of `prompt`.
absl::Status StreamCompletion(const ChatFlags& flags, const std::string& prompt, std::ostream& out);

}  // namespace minke::cli
