// The data plane's traffic and errors by peer, as metrics.
#pragma once

#include "libs/telemetry/page.h"
#include "libs/transport/transport.h"

namespace minke::node {

// Of the peers that are connected and of the last 256 that were. Thread-safe.
void CollectTransport(const transport::Transport& transport, telemetry::Page& page);

}  // namespace minke::node
