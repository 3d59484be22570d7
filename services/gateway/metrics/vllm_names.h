// The metrics of a Minke cluster as one vLLM server would show them, for autoscalers and gateways that look
// for its names:
// --metrics-vllm-names, docs/metrics.md.
#pragma once

#include <cstdint>
#include <string>

#include "libs/telemetry/page.h"

namespace minke::gateway {

// Sums over the cluster's attention nodes.
struct EngineTotals {
  int nodes = 0;  // that have answered lately
  uint64_t running = 0, waiting = 0;
  uint64_t pages = 0, pages_used = 0;
  uint64_t preemptions = 0;
  uint64_t prefix_cache_queries = 0, prefix_cache_hits = 0;
};

// Adds `vllm:` families: copies of the request families that `page` has, and what only attention nodes know.
void AddVllmNames(const std::string& model_name, const EngineTotals& engine, telemetry::Page& page);

}  // namespace minke::gateway
