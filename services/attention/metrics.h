// What an attention node shows to Prometheus: docs/metrics.md.
#pragma once

#include "libs/telemetry/page.h"
#include "services/attention/engine/engine.h"

namespace minke::attention {

// Thread-safe.
void CollectMetrics(const Engine& engine, telemetry::Page& page);

}  // namespace minke::attention
