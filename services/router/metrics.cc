#include "services/router/metrics.h"

namespace minke::router {

void CollectMetrics(RouterService& service, bool routes, telemetry::Page& page) {
  const RouterEngine& engine = service.engine();
  const RouterStatus status = engine.status();
  const auto counter = [&](const char* name, const char* help, uint64_t value) {
    page.Counter(name, help, static_cast<double>(value));
  };
  counter("minke:router_dispatches_total", "Dispatch messages gated", status.dispatches);
  counter("minke:router_rows_total", "Rows gated", status.rows);
  counter("minke:router_rejected_rows_total", "Rows whose scores were not finite", status.rejected_rows);
  counter("minke:router_unplaced_rows_total", "(row, group) pairs that no server could take",
          status.unplaced_rows);
  counter("minke:router_bad_frames_total", "Malformed messages", status.bad_frames);
  page.Gauge("minke:router_leads", "Whether this router decides the placement", service.leads() ? 1 : 0);
  page.Gauge("minke:expert_servers_lost", "Expert servers that have not answered this router for a second",
             static_cast<double>(status.lost.size()));
  service.cluster_counters().Collect(page);
  if (routes) engine.counters().Collect(page);
}

}  // namespace minke::router
