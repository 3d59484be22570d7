// `minke up`: a whole cluster on this machine, every service a child process. `minke serve`: the same in one
// process.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "cli/up_flags.h"

namespace minke::cli {

// Runs until SIGINT or SIGTERM (OK), or until the cluster cannot start or its gateway dies. `on_ready` is
// called once, on a thread of its own, when /health is 200, with the base URL.
using OnReady = std::function<void(const std::string& url)>;
absl::Status RunUp(const UpFlags& flags, const OnReady& on_ready);
absl::Status RunServe(const UpFlags& flags, const OnReady& on_ready);

}  // namespace minke::cli
