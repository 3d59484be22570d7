// What an expert server shows to Prometheus: docs/metrics.md.
#pragma once

#include "libs/telemetry/page.h"
#include "services/experts/expert_service.h"

namespace minke::experts {

// Thread-safe. Series by unit are those of the units hosted now.
void CollectMetrics(ExpertService& service, telemetry::Page& page);

}  // namespace minke::experts
