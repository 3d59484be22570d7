#include "services/experts/metrics.h"

#include <string>

namespace minke::experts {
namespace {

const char* ToString(wire::TrafficClass traffic_class) {
  switch (traffic_class) {  // no default: a new class must fail the build
    case wire::TrafficClass::kDecode:
      return "decode";
    case wire::TrafficClass::kPrefill:
      return "prefill";
  }
  return "unknown";
}

void CollectLaunches(const ExpertEngineCounters& counters, telemetry::Page& page) {
  for (int c = 0; c < wire::kNumTrafficClasses; ++c) {
    const telemetry::Labels labels = {{"class", ToString(static_cast<wire::TrafficClass>(c))}};
    page.Add("minke:expert_launch_rows", "Rows of one grouped launch", counters.launch_rows[c]->Snapshot(),
             labels);
    page.Add("minke:expert_launch_seconds", "One grouped launch, from queue to answers",
             counters.launch_seconds[c]->Snapshot(), labels);
  }
  page.Counter("minke:expert_busy_seconds_total", "Time of the engine thread in launches",
               static_cast<double>(counters.busy_ns.load(std::memory_order_relaxed)) * 1e-9);
  page.Counter("minke:bubble_seconds_total", "Time in which the engine thread had nothing to do but wait",
               static_cast<double>(counters.idle_ns.load(std::memory_order_relaxed)) * 1e-9,
               {{"pool", "experts"}});
}

}  // namespace

void CollectMetrics(ExpertService& service, telemetry::Page& page) {
  const ExpertEngineStatus engine = service.engine().status();
  const ExpertServiceStatus status = service.status();
  const ExpertEngineCounters& counters = service.engine().counters();
  const auto counter = [&](const char* name, const char* help, uint64_t value) {
    page.Counter(name, help, static_cast<double>(value));
  };
  counter("minke:expert_rows_received_total", "Rows received", engine.rows);
  counter("minke:expert_nacked_rows_total", "(row, group) pairs not hosted here", engine.nacked_rows);
  counter("minke:expert_rejected_rows_total", "(row, group) sums that were not finite", engine.rejected_rows);
  counter("minke:expert_bad_frames_total", "Malformed messages", engine.bad_frames);
  counter("minke:expert_dropped_frames_total", "Messages dropped because the queue was full",
          engine.dropped_frames);
  page.Gauge("minke:expert_queued_rows", "Rows waiting", static_cast<double>(engine.queued_rows));
  CollectLaunches(counters, page);

  page.Declare("minke:expert_rows_total", "(row, group) sums computed", telemetry::MetricType::kCounter);
  for (const UnitId unit : status.hosted) {
    page.Counter("minke:expert_rows_total", "(row, group) sums computed",
                 static_cast<double>(counters.UnitRows(unit).load(std::memory_order_relaxed)),
                 {{"layer", std::to_string(unit.layer)},
                  {"group", std::to_string(unit.group)},
                  {"server", minke::ToString(status.node)}});
  }
  const auto units = [&](const char* state, int64_t count) {
    page.Gauge("minke:expert_units", "(layer, group) units of this server", static_cast<double>(count),
               {{"state", state}});
  };
  units("hosted", std::ssize(status.hosted) - status.retiring);
  units("retiring", status.retiring);
  units("loading", status.loading);
  units("failed", status.failed);
  page.Gauge("minke:expert_weight_bytes", "Packed weights of the hosted units",
             static_cast<double>(status.hosted_bytes));
  for (const auto& [source, name] :
       {std::pair{UnitSource::kCheckpoint, "checkpoint"}, std::pair{UnitSource::kReplica, "replica"}}) {
    const ExpertServiceStatus::Loads& loads = status.loaded[static_cast<size_t>(source)];
    page.Summary("minke:unit_load_seconds", "Loading a unit", absl::ToDoubleSeconds(loads.time), loads.units,
                 {{"source", name}});
  }
  const UnitExchangeCounters exchange = service.engine().exchange().counters();
  const auto moved = [&](const char* direction, uint64_t bytes) {
    page.Counter("minke:unit_exchange_bytes_total", "Packed weights from and to other expert servers",
                 static_cast<double>(bytes), {{"direction", direction}});
  };
  moved("fetched", exchange.bytes_fetched);
  moved("given", exchange.bytes_given);
}

}  // namespace minke::experts
