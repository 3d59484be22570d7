#include "services/attention/metrics.h"

#include <string>

namespace minke::attention {
namespace {

// The names that operators of vLLM know, with their meaning.
void CollectScheduling(const EngineStatus& s, telemetry::Page& page) {
  page.Gauge("minke:num_requests_running", "Sequences running", static_cast<double>(s.running));
  page.Gauge("minke:num_requests_waiting", "Sequences waiting for admission", static_cast<double>(s.waiting));
  page.Gauge("minke:kv_cache_usage_perc", "Part of the latent cache's pages that is in use, 0 to 1",
             s.pages_total == 0 ? 0 : static_cast<double>(s.pages_used) / static_cast<double>(s.pages_total));
  const auto counter = [&](const char* name, const char* help, uint64_t value) {
    page.Counter(name, help, static_cast<double>(value));
  };
  counter("minke:num_preemptions_total", "Sequences put back for want of cache pages", s.preemptions);
  counter("minke:prefix_cache_queries_total", "Prompt tokens looked up for reuse", s.reuse_queries);
  counter("minke:prefix_cache_hits_total", "Prompt tokens whose latents were reused", s.reuse_hits);
  counter("minke:attention_prompt_tokens_total", "Prompt tokens taken in", s.prompt_tokens);
  counter("minke:attention_generated_tokens_total", "Tokens sampled", s.generated_tokens);
  counter("minke:attention_computed_tokens_total",
          "Rows computed: prompt tokens that were not reused, and decoded ones", s.computed_tokens);
}

void CollectCache(const EngineStatus& s, telemetry::Page& page) {
  const auto state = [&](const char* name, int64_t pages) {
    page.Gauge("minke:latent_cache_pages", "Pages of 64 tokens", static_cast<double>(pages),
               {{"state", name}});
    page.Gauge("minke:latent_cache_bytes", "Bytes of those pages", static_cast<double>(pages * s.page_bytes),
               {{"state", name}});
  };
  state("used", s.pages_used);
  state("kept", s.pages_cached);
  state("free", s.pages_total - s.pages_used - s.pages_cached);
  const auto moved = [&](const char* direction, uint64_t pages) {
    page.Counter("minke:latent_pages_moved_total", "Pages from and to other attention nodes",
                 static_cast<double>(pages), {{"direction", direction}});
  };
  moved("fetched", s.pages_fetched);
  moved("given", s.pages_given);
  page.Counter("minke:latent_page_fetches_failed_total",
               "Sequences that moved here and had to be computed again in part",
               static_cast<double>(s.fetches_failed));
}

void CollectSteps(const Engine& engine, const EngineStatus& s, telemetry::Page& page) {
  page.Counter("minke:attention_steps_total", "Engine steps", static_cast<double>(s.steps));
  page.Counter("minke:attention_split_steps_total", "Steps computed in more than one microbatch",
               static_cast<double>(s.split_steps));
  for (int kind = 0; kind < kStepKinds; ++kind) {
    page.Add("minke:step_seconds", "One engine step", engine.step_histograms().seconds[kind]->Snapshot(),
             {{"kind", std::string(ToString(static_cast<StepKind>(kind)))}});
  }
  page.Add("minke:step_rows", "Rows of one engine step", engine.step_histograms().rows->Snapshot());
  for (int phase = 0; phase < kStepPhases; ++phase) {
    page.Counter("minke:step_phase_seconds_total", "Where the engine thread's time goes",
                 s.phase_seconds[phase], {{"phase", std::string(ToString(static_cast<StepPhase>(phase)))}});
  }
  page.Counter("minke:bubble_seconds_total", "Time in which the engine thread had nothing to do but wait",
               s.phase_seconds[static_cast<int>(StepPhase::kWait)], {{"pool", "attention"}});
}

void CollectExchange(const Engine& engine, const EngineStatus& s, telemetry::Page& page) {
  const auto counter = [&](const char* name, const char* help, uint64_t value,
                           telemetry::Labels labels = {}) {
    page.Counter(name, help, static_cast<double>(value), std::move(labels));
  };
  counter("minke:dispatched_rows_total", "Rows sent to be routed, in all layers", s.dispatched_rows);
  counter("minke:redispatched_rows_total", "(row, group) pairs sent again", s.redispatched_rows);
  counter("minke:hedged_rows_total", "(row, group) pairs asked of a second replica", s.hedged_rows);
  counter("minke:plan_retries_total", "Messages sent to a router again", s.plan_retries);
  counter("minke:duplicate_rows_total", "(row, group) answers that were there already", s.duplicate_rows);
  counter("minke:stale_frames_total", "Messages of a step or attempt that is over", s.stale_frames);
  counter("minke:attention_bad_frames_total", "Malformed messages", s.bad_frames);
  constexpr char kFailovers[] = "minke:failovers_total";
  constexpr char kFailoversHelp[] = "Peers lost while they had rows of this node, which went to others";
  counter(kFailovers, kFailoversHelp, s.router_failovers, {{"kind", "router"}});
  counter(kFailovers, kFailoversHelp, s.expert_failovers, {{"kind", "expert"}});
  const auto latency = [&](const char* name, const char* help, const ExchangeLatencies::ByServer& latencies) {
    page.Declare(name, help, telemetry::MetricType::kHistogram);
    latencies.ForEach([&](NodeId server, const telemetry::Histogram& histogram) {
      page.Add(name, help, histogram.Snapshot(), {{"server", ToString(server)}});
    });
  };
  latency("minke:dispatch_seconds", "From sending rows to a router until their plan is here",
          engine.exchange_latencies().dispatch);
  latency("minke:combine_seconds", "From sending rows on their way until an expert server's sums are here",
          engine.exchange_latencies().combine);
}

}  // namespace

void CollectMetrics(AttentionService& service, telemetry::Page& page) {
  const Engine& engine = service.engine();
  const EngineStatus status = engine.status();
  CollectScheduling(status, page);
  CollectCache(status, page);
  CollectSteps(engine, status, page);
  CollectExchange(engine, status, page);
  if (service.tracer() != nullptr) service.tracer()->Collect(page);
  if (const router::RouteCounters* counters = engine.route_counters()) counters->Collect(page);
}

}  // namespace minke::attention
