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

}  // namespace minke::attention
