// A page in prometheus-cpp's own types. Of this library only.
#pragma once

#include <prometheus/metric_family.h>

#include <vector>

#include "libs/telemetry/page.h"

namespace minke::telemetry {

std::vector<prometheus::MetricFamily> ToPrometheus(const Page& page);

}  // namespace minke::telemetry
