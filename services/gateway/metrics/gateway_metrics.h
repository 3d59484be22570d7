// What a gateway has counted, as metrics: docs/metrics.md.
#pragma once

#include <string>

#include "libs/telemetry/page.h"
#include "services/gateway/generation/admission.h"

namespace minke::gateway {

// Thread-safe.
void CollectMetrics(const std::string& model_name, const GatewayCounters& counters, telemetry::Page& page);

}  // namespace minke::gateway
