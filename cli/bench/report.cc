#include "cli/bench/report.h"

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSchema = 1;

struct Derived {
  double elapsed_s, requests_per_s, prompt_tokens_per_s, output_tokens_per_s, tokens_per_s, cpu_share,
      under_way_mean;
};

Derived Derive(const ServeReport& report) {
  const RunStatistics& s = report.statistics;
  const double elapsed = std::chrono::duration<double>(report.state.elapsed).count();
  const auto rate = [&](double count) { return elapsed > 0 ? count / elapsed : 0; };
  const auto prompt = static_cast<double>(s.prompt.tokens), output = static_cast<double>(s.output.tokens);
  return {.elapsed_s = elapsed,
          .requests_per_s = rate(static_cast<double>(s.completed)),
          .prompt_tokens_per_s = rate(prompt),
          .output_tokens_per_s = rate(output),
          .tokens_per_s = rate(prompt + output),
          .cpu_share = rate(report.cpu_user_s + report.cpu_system_s),
          .under_way_mean = rate(s.busy_s)};
}

struct Row {
  const char* key;
  const char* title;
  Summary summary;
};

std::vector<Row> Latencies(const ServeReport& report) {
  const RunStatistics& s = report.statistics;
  std::vector<Row> rows = {{"ttft_ms", "time to first token", Summarise(s.first_token_ms)},
                           {"tpot_ms", "time per output token", Summarise(s.per_output_token_ms)},
                           {"itl_ms", "inter-token latency", Summarise(s.gap_ms)},
                           {"e2e_ms", "end to end", Summarise(s.total_ms)}};
  if (report.flags.rate) rows.push_back({"send_delay_ms", "due to sent", Summarise(s.send_delay_ms)});
  return rows;
}

// 12345678 -> 12,345,678
std::string Grouped(int64_t value) {
  std::string digits = std::to_string(value);
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3)
    digits.insert(static_cast<size_t>(at), 1, ',');
  return digits;
}

std::string Number(double value) { return absl::StrFormat(value < 10 ? "%.2f" : "%.1f", value); }

// "usage", or "usage 90, events 10" if not all were counted alike.
std::string How(const TokenCount& count) {
  std::string text;
  for (const auto& [by, requests] : count.requests) {
    StrAppend(&text, text.empty() ? "" : ", ", ToString(by));
    if (count.requests.size() > 1) StrAppend(&text, " ", requests);
  }
  return text;
}

Json ToJson(const TokenCount& count) {
  Json by = Json::object();
  for (const auto& [counted_by, requests] : count.requests) by[ToString(counted_by)] = requests;
  return by;
}

Json ToJson(const Summary& summary) {
  Json json = {{"count", summary.count}};
  if (summary.count == 0) return json;
  json["mean"] = summary.mean;
  json["p50"] = summary.p50;
  json["p90"] = summary.p90;
  json["p99"] = summary.p99;
  json["max"] = summary.max;
  return json;
}

template <typename T>
Json OrNull(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json ToJson(const ServeFlags& flags) {
  return {{"url", flags.url},
          {"endpoint", flags.endpoint},
          {"model", flags.model},
          {"requests", OrNull(flags.requests)},
          {"duration", OrNull(flags.duration_s)},
          {"concurrency", flags.rate ? Json(nullptr) : Json(flags.concurrency)},
          {"rate", OrNull(flags.rate)},
          {"arrival", flags.rate ? Json(flags.arrival) : Json(nullptr)},
          {"concurrency_max", flags.rate ? Json(flags.concurrency_max) : Json(nullptr)},
          {"warmup", flags.warmup},
          {"timeout", flags.timeout_s},
          {"prompt_source", flags.prompt_source},
          {"prompt_file", flags.prompt_file},
          {"prompt_tokens", flags.prompt_tokens},
          {"output_tokens", flags.output_tokens},
          {"shared_prefix_tokens", flags.shared_prefix_tokens},
          {"chars_per_token", flags.chars_per_token},
          {"token_ids", flags.token_ids},
          {"seed", flags.seed},
          {"temperature", flags.temperature},
          {"ignore_eos", flags.ignore_eos},
          {"return_token_ids", flags.return_token_ids},
          {"stream_usage", !flags.no_stream_usage},
          {"extra_body", flags.extra_body}};
}

}  // namespace

std::string FormatTable(const ServeReport& report) {
  const ServeFlags& flags = report.flags;
  const RunStatistics& s = report.statistics;
  const Derived d = Derive(report);
  std::string out = StrCat("minke bench serve ", report.version, " · ", flags.url, " · ",
                           flags.prompt_source == "jsonl" ? "recorded requests" : flags.endpoint, " · model ",
                           report.model, " · seed ", flags.seed, "\n");
  if (flags.rate) {
    absl::StrAppendFormat(&out, "open loop, %g requests/s, %s arrivals, at most %d at once", *flags.rate,
                          flags.arrival, flags.concurrency_max);
  } else {
    absl::StrAppendFormat(&out, "closed loop, %d at once", flags.concurrency);
  }
  if (flags.prompt_source != "jsonl")
    StrAppend(&out, " · prompts ", flags.prompt_tokens, " (", flags.prompt_source, ")");
  if (flags.shared_prefix_tokens > 0) StrAppend(&out, " + ", flags.shared_prefix_tokens, " shared");
  StrAppend(&out, " · answers ", flags.output_tokens, " tokens\n");
  if (report.interrupted) out += "INTERRUPTED: only what was finished by then counts\n";

  absl::StrAppendFormat(&out, "\n%-22s%s completed, %s failed", "requests", Grouped(s.completed),
                        Grouped(s.failed));
  if (s.interrupted > 0) absl::StrAppendFormat(&out, ", %s interrupted", Grouped(s.interrupted));
  if (report.state.not_sent > 0)
    absl::StrAppendFormat(&out, ", %s due but NOT SENT: latencies are too good",
                          Grouped(report.state.not_sent));
  absl::StrAppendFormat(&out, " in %.2f s; %s at once on average, %d at most\n", d.elapsed_s,
                        Number(d.under_way_mean), report.state.under_way_max);
  for (const auto& [kind, errors] : s.errors)
    absl::StrAppendFormat(&out, "%-22s%s × %s: %s\n", "", Grouped(errors.count), kind, errors.example);
  if (s.completed > 0) {
    absl::StrAppendFormat(&out, "%-22s%s prompt (%s", "tokens", Grouped(s.prompt.tokens), How(s.prompt));
    if (s.cached_tokens) absl::StrAppendFormat(&out, "; %s cached", Grouped(*s.cached_tokens));
    absl::StrAppendFormat(&out, "), %s output (%s)\n", Grouped(s.output.tokens), How(s.output));
    absl::StrAppendFormat(&out, "%-22s%s requests/s, %s prompt + %s output = %s tokens/s\n", "throughput",
                          Number(d.requests_per_s), Number(d.prompt_tokens_per_s),
                          Number(d.output_tokens_per_s), Number(d.tokens_per_s));
    absl::StrAppendFormat(&out, "\n%-22s%10s%10s%10s%10s%10s\n", "latency [ms]", "mean", "p50", "p90", "p99",
                          "max");
    for (const Row& row : Latencies(report)) {
      absl::StrAppendFormat(&out, "%-22s", row.title);
      if (row.summary.count == 0) {
        absl::StrAppendFormat(&out, "%10s\n", "-");
        continue;
      }
      for (const double value :
           {row.summary.mean, row.summary.p50, row.summary.p90, row.summary.p99, row.summary.max}) {
        absl::StrAppendFormat(&out, "%10s", Number(value));
      }
      out += "\n";
    }
    if (s.without_output > 0)
      absl::StrAppendFormat(&out, "%-22s%s answers without any output\n", "", Grouped(s.without_output));
  }
  absl::StrAppendFormat(&out, "\n%-22s%.2f s CPU (%.1f %% of one core), %s connections\n", "this tool",
                        report.cpu_user_s + report.cpu_system_s, 100 * d.cpu_share,
                        Grouped(report.connections_opened));
  return out;
}

std::string FormatJson(const ServeReport& report) {
  const RunStatistics& s = report.statistics;
  const Derived d = Derive(report);
  Json errors = Json::array();
  for (const auto& [kind, entry] : s.errors)
    errors.push_back({{"kind", kind}, {"count", entry.count}, {"example", entry.example}});
  Json json = {
      {"tool", "minke bench serve"},
      {"schema", kSchema},
      {"version", report.version},
      {"flags", ToJson(report.flags)},
      {"model", report.model},
      {"interrupted", report.interrupted},
      {"elapsed_s", d.elapsed_s},
      {"requests",
       {{"started", report.state.started},
        {"completed", s.completed},
        {"failed", s.failed},
        {"interrupted", s.interrupted},
        {"not_sent", report.state.not_sent},
        {"without_output", s.without_output}}},
      {"errors", errors},
      {"concurrency", {{"mean", d.under_way_mean}, {"max", report.state.under_way_max}}},
      {"tokens",
       {{"prompt", s.prompt.tokens},
        {"prompt_counted_by", ToJson(s.prompt)},
        {"cached_prompt", OrNull(s.cached_tokens)},
        {"output", s.output.tokens},
        {"output_counted_by", ToJson(s.output)}}},
      {"throughput",
       {{"requests_per_s", d.requests_per_s},
        {"prompt_tokens_per_s", d.prompt_tokens_per_s},
        {"output_tokens_per_s", d.output_tokens_per_s},
        {"tokens_per_s", d.tokens_per_s}}},
  };
  for (const Row& row : Latencies(report)) json[row.key] = ToJson(row.summary);
  json["client"] = {{"cpu_user_s", report.cpu_user_s},
                    {"cpu_system_s", report.cpu_system_s},
                    {"cpu_share_of_one_core", d.cpu_share},
                    {"connections_opened", report.connections_opened}};
  // Error examples are a server's words, in whatever encoding.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace minke::cli::bench
