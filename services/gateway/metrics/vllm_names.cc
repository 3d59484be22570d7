#include "services/gateway/metrics/vllm_names.h"

#include <utility>

#include "libs/base/strings.h"
#include "libs/cluster/prefix_hash.h"

namespace minke::gateway {
namespace {

constexpr std::pair<const char*, const char*> kSame[] = {
    {"minke:time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
    {"minke:inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
    {"minke:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"},  // its name until 0.11
    {"minke:request_time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"},
    {"minke:e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"},
    {"minke:request_queue_time_seconds", "vllm:request_queue_time_seconds"},
    {"minke:request_prefill_time_seconds", "vllm:request_prefill_time_seconds"},
    {"minke:request_decode_time_seconds", "vllm:request_decode_time_seconds"},
    {"minke:request_inference_time_seconds", "vllm:request_inference_time_seconds"},
    {"minke:request_prompt_tokens", "vllm:request_prompt_tokens"},
    {"minke:request_generation_tokens", "vllm:request_generation_tokens"},
    {"minke:request_params_max_tokens", "vllm:request_params_max_tokens"},
    {"minke:request_params_n", "vllm:request_params_n"},
    {"minke:prompt_tokens_total", "vllm:prompt_tokens_total"},
    {"minke:generation_tokens_total", "vllm:generation_tokens_total"},
    {"minke:request_success_total", "vllm:request_success_total"}};

}  // namespace

void AddVllmNames(const std::string& model_name, const EngineTotals& engine, telemetry::Page& page) {
  const std::pair<std::string, std::string> engine_label = {"engine", "0"};  // the cluster is one
  for (const auto& [ours, theirs] : kSame) {
    const telemetry::Family* from = page.Find(ours);
    if (from == nullptr) continue;
    telemetry::Family& to = page.Declare(theirs, from->help, from->type);
    for (const telemetry::Point& point : from->points) {
      to.points.push_back(point);
      to.points.back().labels.push_back(engine_label);
    }
  }
  if (engine.nodes == 0) return;  // unknown is not zero
  const telemetry::Labels labels = {{"model_name", model_name}, engine_label};
  const double usage =
      engine.pages == 0 ? 0 : static_cast<double>(engine.pages_used) / static_cast<double>(engine.pages);
  page.Gauge("vllm:num_requests_running", "Sequences running", static_cast<double>(engine.running), labels);
  page.Gauge("vllm:num_requests_waiting", "Sequences waiting for admission",
             static_cast<double>(engine.waiting), labels);
  page.Gauge("vllm:kv_cache_usage_perc", "Part of the latent cache's pages that is in use, 0 to 1", usage,
             labels);
  page.Gauge("vllm:gpu_cache_usage_perc", "The same, under its older name", usage, labels);
  page.Counter("vllm:num_preemptions_total", "Sequences put back for want of cache pages",
               static_cast<double>(engine.preemptions), labels);
  page.Counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up for reuse",
               static_cast<double>(engine.prefix_cache_queries), labels);
  page.Counter("vllm:prefix_cache_hits_total", "Prompt tokens whose latents were reused",
               static_cast<double>(engine.prefix_cache_hits), labels);
  page.Gauge("vllm:cache_config_info", "The latent cache; the value is 1", 1,
             {engine_label,
              {"block_size", std::to_string(cluster::kPrefixPageTokens)},
              {"num_gpu_blocks", std::to_string(engine.pages)}});
}

}  // namespace minke::gateway
