// Spans as an OTLP request.
#pragma once

#include <span>
#include <string>

#include "libs/tracing/span.h"

namespace minke::tracing {

// An ExportTraceServiceRequest, serialised. `service`, `instance`: of this process.
std::string ToOtlp(std::span<const Span> spans, const std::string& service, const std::string& instance);

}  // namespace minke::tracing
