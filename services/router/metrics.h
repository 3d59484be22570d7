// What a router shows to Prometheus: docs/metrics.md.
#pragma once

#include "libs/telemetry/page.h"
#include "services/router/router_service.h"

namespace minke::router {

// Thread-safe. `routes`: whether this process's router gates rows; otherwise an attention node does, and
// shows what is counted of them.
void CollectMetrics(RouterService& service, bool routes, telemetry::Page& page);

}  // namespace minke::router
