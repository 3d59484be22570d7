// What a router shows to Prometheus.
#pragma once

#include <vector>

#include "libs/telemetry/metrics.h"
#include "services/router/router_service.h"

namespace minke::router {

inline std::vector<telemetry::Sample> CollectMetrics(RouterService& service) {
  using telemetry::Sample;
  RouterEngine& engine = service.engine();
  const RouterStatus status = engine.status();
  const auto counter = [](std::string name, std::string help, uint64_t value) {
    return Sample{std::move(name), std::move(help), Sample::Type::kCounter, {}, static_cast<double>(value)};
  };
  std::vector<Sample> samples = {
      counter("router_dispatches_total", "Dispatch messages gated", status.dispatches),
      counter("router_rows_total", "Rows gated", status.rows),
      counter("router_rejected_rows_total", "Rows whose scores were not finite", status.rejected_rows),
      counter("router_unplaced_rows_total", "(row, group) pairs that no server could take",
              status.unplaced_rows),
      counter("router_bad_frames_total", "Malformed messages", status.bad_frames),
      {"router_leads",
       "Whether this router decides the placement",
       Sample::Type::kGauge,
       {},
       service.leads() ? 1.0 : 0.0}};
  const std::vector<int32_t> layers = engine.moe_layers();
  const auto counts = engine.ExpertCounts();
  for (size_t i = 0; i < layers.size(); ++i) {
    for (size_t e = 0; e < counts[i].size(); ++e) {
      samples.push_back({"expert_selections_total",
                         "Rows for which the gate chose the expert",
                         Sample::Type::kCounter,
                         {{"layer", std::to_string(layers[i])}, {"expert", std::to_string(e)}},
                         static_cast<double>(counts[i][e])});
    }
  }
  return samples;
}

}  // namespace minke::router
