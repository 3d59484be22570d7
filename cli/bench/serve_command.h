// minke bench serve: puts load on a server with the OpenAI API, and measures it.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "cli/bench/serve_flags.h"

namespace minke::cli::bench {

// Runs to the end, or to a SIGINT or SIGTERM, which must not be blocked, and reports on `out`. Progress and
// what is not the result go to stderr. Not ok: nothing was measured, all requests failed, or --fail-on-error
// and any did; the report is written all the same.
absl::Status RunServe(const ServeFlags& flags, const std::string& version, std::ostream& out);

}  // namespace minke::cli::bench
