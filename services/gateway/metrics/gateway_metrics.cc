#include "services/gateway/metrics/gateway_metrics.h"

namespace minke::gateway {

void CollectMetrics(const std::string& model_name, const GatewayCounters& counters, telemetry::Page& page) {
  const auto counter = [&](const char* name, const char* help, const std::atomic<uint64_t>& value,
                           telemetry::Labels labels = {}) {
    page.Counter(name, help, static_cast<double>(value.load(std::memory_order_relaxed)), std::move(labels));
  };
  counters.requests.Collect(model_name, page);
  counter("minke:prompt_tokens_total", "Prompt tokens of admitted requests", counters.prompt_tokens,
          {{"model_name", model_name}});
  counter("minke:generation_tokens_total", "Tokens generated for clients", counters.completion_tokens,
          {{"model_name", model_name}});
  counters.responses.Collect(page);
  counter("minke:requests_admitted_total", "API requests admitted", counters.generations);
  counter("minke:requests_refused_total", "API requests refused because the gateway was full",
          counters.generations_refused);
  counter("minke:requests_abandoned_total", "API requests whose client left", counters.generations_abandoned);
  counter("minke:stream_errors_total", "Errors told inside a stream that had begun", counters.stream_errors);
  counter("minke:resubmissions_total", "Sequences given to another attention node because theirs was lost",
          counters.resubmissions);
  counter("minke:migrations_total", "Sequences moved away from attention nodes that drain",
          counters.migrations);
}

}  // namespace minke::gateway
