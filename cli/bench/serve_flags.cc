#include "cli/bench/serve_flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>

#include "absl/strings/numbers.h"
#include "libs/base/status.h"

namespace minke::cli::bench {
namespace {

constexpr int kConcurrencyMax = 1 << 16;  // a client has some 28,000 ports for one server anyway
constexpr int64_t kRequestsMax = 1'000'000'000;
constexpr int64_t kRequestsByDefault = 100;
constexpr int kWarmupConcurrencyMax = 32;
constexpr double kSecondsMax = 7 * 86400;

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

void AddServeFlags(CLI::App& app, ServeFlags& flags) {
  app.add_option("--url", flags.url, "server; a path other than /v1 is kept")->capture_default_str();
  app.add_option("--endpoint", flags.endpoint, "completions or chat")
      ->check(CLI::IsMember({"completions", "chat"}))
      ->capture_default_str();
  app.add_option("--model", flags.model, "default: the first the server lists");
  app.add_option("--api-key-file", flags.api_key_file, "the first key in it is used");
  AddClientTlsFlags(app, flags.tls);

  app.add_option("--requests", flags.requests, "how many (default 100, or what --duration brings)")
      ->check(CLI::Range(int64_t{1}, kRequestsMax));
  app.add_option("--duration", flags.duration_s, "seconds after which no request begins any more")
      ->check(CLI::Range(0.001, kSecondsMax));
  CLI::Option* concurrency = app.add_option("--concurrency", flags.concurrency,
                                            "closed loop: requests at once, each followed by the next")
                                 ->check(CLI::Range(1, kConcurrencyMax))
                                 ->capture_default_str();
  CLI::Option* rate =
      app.add_option("--rate", flags.rate, "open loop: requests a second, however slow the answers")
          ->check(CLI::Range(1e-6, 1e5))
          ->excludes(concurrency);
  app.add_option("--arrival", flags.arrival, "poisson or uniform (evenly spaced)")
      ->check(CLI::IsMember({"poisson", "uniform"}))
      ->capture_default_str()
      ->needs(rate);
  app.add_option("--concurrency-max", flags.concurrency_max,
                 "open loop: more at once have to wait, which counts as their latency")
      ->check(CLI::Range(1, kConcurrencyMax))
      ->capture_default_str()
      ->needs(rate);
  app.add_option("--warmup", flags.warmup, "requests before the run that do not count")
      ->check(CLI::Range(int64_t{0}, kRequestsMax))
      ->capture_default_str();
  app.add_option("--timeout", flags.timeout_s, "seconds for one request, all in all")
      ->check(CLI::Range(0.001, kSecondsMax))
      ->capture_default_str();

  app.add_option(
         "--prompt-source", flags.prompt_source,
         "words: random English; text: passages of a file; random-ids: token ids; jsonl: recorded requests")
      ->check(CLI::IsMember({"words", "text", "random-ids", "jsonl"}))
      ->capture_default_str();
  app.add_option("--prompt-file", flags.prompt_file, "for text and jsonl");
  app.add_option(
         "--prompt-tokens", flags.prompt_tokens,
         "length of prompts: N, MIN:MAX, normal:MEAN:STDDEV[:MIN:MAX], lognormal:MEDIAN:SIGMA[:MIN:MAX], "
         "zipf:EXPONENT:MIN:MAX or file:PATH")
      ->capture_default_str();
  app.add_option("--output-tokens", flags.output_tokens, "max_tokens, written the same way")
      ->capture_default_str();
  app.add_option("--shared-prefix-tokens", flags.shared_prefix_tokens,
                 "the same tokens in front of every prompt")
      ->check(CLI::Range(int64_t{0}, kLengthTokensMax))
      ->capture_default_str();
  app.add_option("--chars-per-token", flags.chars_per_token, "text sent for each token of words and text")
      ->check(CLI::Range(0.1, 100.0))
      ->capture_default_str();
  app.add_option("--token-ids", flags.token_ids, "MIN:MAX of random-ids")->capture_default_str();
  app.add_option("--seed", flags.seed, "the same seed sends the same requests")->capture_default_str();

  app.add_option("--temperature", flags.temperature)->check(CLI::Range(0.0, 2.0))->capture_default_str();
  app.add_flag("--ignore-eos", flags.ignore_eos, "extension: answers reach their whole length");
  app.add_flag("--return-token-ids", flags.return_token_ids,
               "extension: counts tokens where usage is missing");
  app.add_flag("--no-stream-usage", flags.no_stream_usage,
               "do not ask for usage, for servers that refuse it");
  app.add_option("--extra-body", flags.extra_body, "JSON object, merged into every request");

  app.add_option("--json", flags.json,
                 "write the result there too; -: to standard output, the table to stderr");
  app.add_flag("--fail-on-error", flags.fail_on_error,
               "exit code 1 if any request failed, not only if all did");
}

absl::StatusOr<Endpoint> ServeEndpoint(const ServeFlags& flags) {
  MK_ASSIGN_OR_RETURN(Url url, ParseUrl(flags.url));
  if (url.path.empty()) url.path = "/v1";
  return ToEndpoint(url, flags.tls);
}

absl::StatusOr<RequestOptions> ToRequestOptions(const ServeFlags& flags) {
  RequestOptions options{.chat = flags.endpoint == "chat",
                         .prompt_file = flags.prompt_file,
                         .prompt_tokens = flags.prompt_tokens,
                         .output_tokens = flags.output_tokens,
                         .shared_prefix_tokens = flags.shared_prefix_tokens,
                         .chars_per_token = flags.chars_per_token,
                         .seed = flags.seed,
                         .temperature = flags.temperature,
                         .stream_usage = !flags.no_stream_usage,
                         .ignore_eos = flags.ignore_eos,
                         .return_token_ids = flags.return_token_ids,
                         .extra_body = flags.extra_body};
  options.source = flags.prompt_source == "text"         ? PromptSource::kText
                   : flags.prompt_source == "random-ids" ? PromptSource::kRandomIds
                   : flags.prompt_source == "jsonl"      ? PromptSource::kJsonl
                                                         : PromptSource::kWords;
  const size_t colon = flags.token_ids.find(':');
  if (colon == std::string::npos ||
      !absl::SimpleAtoi(flags.token_ids.substr(0, colon), &options.token_id_min) ||
      !absl::SimpleAtoi(flags.token_ids.substr(colon + 1), &options.token_id_max)) {
    return absl::InvalidArgumentError(StrCat("--token-ids: expected MIN:MAX, found ", flags.token_ids));
  }
  return options;
}

LoadPlan ToLoadPlan(const ServeFlags& flags) {
  LoadPlan plan{.requests_max = flags.requests,
                .concurrency = flags.rate ? flags.concurrency_max : flags.concurrency,
                .rate_per_s = flags.rate,
                .arrival = flags.arrival == "uniform" ? Arrival::kUniform : Arrival::kPoisson,
                .timeout = Seconds(flags.timeout_s),
                .seed = flags.seed};
  if (flags.duration_s) plan.duration_max = Seconds(*flags.duration_s);
  if (!flags.requests && !flags.duration_s) plan.requests_max = kRequestsByDefault;
  return plan;
}

LoadPlan ToWarmupPlan(const ServeFlags& flags) {
  return {
      .requests_max = flags.warmup,
      .concurrency = flags.rate ? kWarmupConcurrencyMax : std::min(flags.concurrency, kWarmupConcurrencyMax),
      .timeout = Seconds(flags.timeout_s),
      .seed = flags.seed};
}

}  // namespace minke::cli::bench
