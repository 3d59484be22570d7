#include "services/attention/attention_flags.h"

#include <CLI/CLI.hpp>
#include <charconv>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/tokenizer/tokenizer.h"

namespace minke::attention {

void AddAttentionFlags(CLI::App& app, AttentionFlags& flags) {
  app.add_option("--routing", flags.routing, "who gates rows: the router, or the attention node itself")
      ->check(CLI::IsMember({"remote", "local"}))
      ->capture_default_str();
  app.add_option("--microbatches", flags.microbatches, "parts of a step in flight at once: auto, or 1 to 8")
      ->check(CLI::IsMember({"auto", "1", "2", "3", "4", "5", "6", "7", "8"}))
      ->capture_default_str();
  app.add_option("--mla", flags.mla, "form of attention; auto: naive for long prompt chunks")
      ->check(CLI::IsMember({"auto", "absorbed", "naive"}))
      ->capture_default_str();
  app.add_option(
         "--tensor-parallel", flags.tensor_parallel,
         "ranks, each with its part of the heads and inner dimensions, all with the whole latent cache")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--cache-mib", flags.cache_mib, "size of the latent cache")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--prefix-cache", flags.prefix_cache,
                 "reuse of latent cache pages by requests that begin the same")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  app.add_option("--step-tokens", flags.step_tokens, "rows of one step")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--decode-stretch", flags.decode_stretch,
                 "while others decode, a lone prompt may make a step take so many times as long; 0: no limit")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  app.add_option("--sequences", flags.sequences, "sequences running at once")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--waiting", flags.waiting, "requests waiting for admission")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--trace-file", flags.trace_file,
                 "write where the time of the first steps goes, for ui.perfetto.dev");
  app.add_option("--trace-steps", flags.trace_steps, "steps of the trace")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--unavailable-after-s", flags.unavailable_after_s,
                 "how long a request waits for experts that nobody can reach before it fails")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
}

absl::StatusOr<AttentionServiceOptions> ToServiceOptions(const AttentionFlags& flags,
                                                         const Checkpoint& checkpoint, Precision precision) {
  AttentionServiceOptions options;
  options.precision = precision;
  options.local_routing = flags.routing == "local";
  options.engine.limits = {flags.step_tokens, flags.sequences, flags.waiting, flags.decode_stretch,
                           flags.prefix_cache == "on"};
  options.engine.trace_file = flags.trace_file;
  options.engine.trace_steps = flags.trace_steps;
  options.engine.cache_bytes = flags.cache_mib << 20;
  options.engine.microbatches = flags.microbatches == "auto" ? 0 : flags.microbatches[0] - '0';
  options.mla = flags.mla == "naive"      ? MlaChoice::kNaive
                : flags.mla == "absorbed" ? MlaChoice::kAbsorbed
                                          : MlaChoice::kAuto;
  options.tensor_parallel = flags.tensor_parallel;
  options.weights_from = flags.weights_from;
  options.engine.exchange.total_timeout = absl::Seconds(flags.unavailable_after_s);
  absl::StatusOr<std::unique_ptr<tokenizer::Tokenizer>> tokenizer =
      tokenizer::Tokenizer::Load(checkpoint.directory());
  if (absl::IsNotFound(tokenizer.status()))
    return options;  // token ids only: every row of the head may be sampled
  if (!tokenizer.ok()) return tokenizer.status();
  options.allowed_tokens.resize(checkpoint.config().vocab_size);
  for (size_t id = 0; id < options.allowed_tokens.size(); ++id) {
    options.allowed_tokens[id] = (*tokenizer)->HasToken(static_cast<uint32_t>(id));
  }
  return options;
}

std::vector<telemetry::Sample> CollectMetrics(const Engine& engine) {
  using telemetry::Sample;
  const EngineStatus s = engine.status();
  const auto counter = [](const char* name, const char* help, uint64_t value) {
    return Sample{name, help, Sample::Type::kCounter, {}, static_cast<double>(value)};
  };
  const auto gauge = [](const char* name, const char* help, int64_t value) {
    return Sample{name, help, Sample::Type::kGauge, {}, static_cast<double>(value)};
  };
  std::vector<Sample> samples = {
      counter("attention_steps_total", "Engine steps", s.steps),
      counter("attention_generated_tokens_total", "Tokens sampled", s.generated_tokens),
      counter("attention_prompt_tokens_total", "Prompt tokens taken in", s.prompt_tokens),
      counter("attention_computed_tokens_total",
              "Rows computed: prompt tokens that were not reused, and decoded ones", s.computed_tokens),
      counter("attention_prefix_cache_queries_total", "Prompt tokens looked up for reuse", s.reuse_queries),
      counter("attention_prefix_cache_hits_total", "Prompt tokens whose latents were reused", s.reuse_hits),
      gauge("attention_cache_pages_kept", "Latent cache pages kept for reuse only", s.pages_cached),
      counter("attention_pages_fetched_total", "Latent cache pages taken over from other nodes",
              s.pages_fetched),
      counter("attention_pages_given_total", "Latent cache pages given to other nodes", s.pages_given),
      counter("attention_page_fetches_failed_total",
              "Sequences that moved here and had to be computed again in part", s.fetches_failed),
      counter("attention_split_steps_total", "Steps computed in more than one microbatch", s.split_steps),
      counter("attention_preemptions_total", "Sequences put back for want of cache pages", s.preemptions),
      counter("attention_redispatched_rows_total", "(row, group) pairs sent again", s.redispatched_rows),
      counter("attention_hedged_rows_total", "(row, group) pairs asked of a second replica", s.hedged_rows),
      counter("attention_stale_frames_total", "Messages of a step or attempt that is over", s.stale_frames),
      counter("attention_duplicate_rows_total", "(row, group) answers that were there already",
              s.duplicate_rows),
      counter("attention_bad_frames_total", "Malformed messages", s.bad_frames),
      gauge("attention_sequences_running", "Sequences running", s.running),
      gauge("attention_sequences_waiting", "Requests waiting for admission", s.waiting),
      gauge("attention_cache_pages", "Pages of the latent cache", s.pages_total),
      gauge("attention_cache_pages_used", "Pages in use", s.pages_used)};
  for (int phase = 0; phase < kStepPhases; ++phase) {
    samples.push_back({"attention_step_seconds_total",
                       "Where the engine thread's time goes",
                       Sample::Type::kCounter,
                       {{"phase", std::string(ToString(static_cast<StepPhase>(phase)))}},
                       s.phase_seconds[phase]});
  }
  return samples;
}

}  // namespace minke::attention
