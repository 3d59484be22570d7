// What an attention node shows to Prometheus: docs/metrics.md.
#pragma once

#include "libs/telemetry/page.h"
#include "services/attention/attention_service.h"

namespace minke::attention {

// Thread-safe.
void CollectMetrics(AttentionService& service, telemetry::Page& page);

}  // namespace minke::attention
