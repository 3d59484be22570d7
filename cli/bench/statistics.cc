#include "cli/bench/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libs/base/status.h"

namespace minke::cli::bench {
namespace {

double Milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

void Count(TokenCount& count, std::optional<int64_t> tokens, CountedBy counted_by) {
  count.tokens += tokens.value_or(0);
  ++count.requests[tokens ? counted_by : CountedBy::kUnknown];
}

// Tokens of the answer, and who counted them.
int64_t CountOutput(const AnswerReader& answer, TokenCount& output) {
  if (const auto tokens = answer.usage().completion_tokens) {
    Count(output, tokens, CountedBy::kUsage);
    return *tokens;
  }
  const auto by = answer.token_ids() ? CountedBy::kTokenIds : CountedBy::kEvents;
  const int64_t tokens = answer.token_ids().value_or(answer.output_events());
  Count(output, tokens, by);
  return tokens;
}

}  // namespace

double Percentile(std::vector<double>& samples, double percent) {
  MK_CHECK(!samples.empty() && percent > 0 && percent <= 100);
  const double rank = std::ceil(percent / 100 * static_cast<double>(samples.size()));
  const size_t at = std::min(static_cast<size_t>(std::max(rank, 1.0)), samples.size()) - 1;
  std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(at), samples.end());
  return samples[at];
}

Summary Summarise(std::vector<double> samples) {
  if (samples.empty()) return {};
  return {.count = static_cast<int64_t>(samples.size()),
          .mean = std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size()),
          .p50 = Percentile(samples, 50),
          .p90 = Percentile(samples, 90),
          .p99 = Percentile(samples, 99),
          .max = Percentile(samples, 100)};
}

std::string ToString(CountedBy counted_by) {
  switch (counted_by) {
    case CountedBy::kUsage:
      return "usage";
    case CountedBy::kTokenIds:
      return "token_ids";
    case CountedBy::kEvents:
      return "events";
    case CountedBy::kRequest:
      return "request";
    case CountedBy::kUnknown:
      return "unknown";
  }
  return "?";
}

void RunStatistics::Add(const RequestRecord& record) {
  busy_s += std::chrono::duration<double>(record.end - record.sent).count();
  switch (record.outcome) {
    case Outcome::kInterrupted:
      ++interrupted;
      return;
    case Outcome::kFailed: {
      ++failed;
      Errors& error = errors[record.error_kind];
      if (error.count++ == 0) error.example = record.error_text;
      return;
    }
    case Outcome::kCompleted:
      ++completed;
      break;
  }
  const AnswerReader& answer = record.answer;
  const Usage& usage = answer.usage();
  const bool told = usage.prompt_tokens.has_value();
  Count(prompt, told ? usage.prompt_tokens : record.prompt_tokens_asked,
        told ? CountedBy::kUsage : CountedBy::kRequest);
  if (usage.cached_tokens) cached_tokens = cached_tokens.value_or(0) + *usage.cached_tokens;
  const int64_t output_tokens = CountOutput(answer, output);

  total_ms.push_back(Milliseconds(record.end - record.scheduled));
  send_delay_ms.push_back(Milliseconds(record.sent - record.scheduled));
  if (!answer.first_output()) {
    ++without_output;
    return;
  }
  first_token_ms.push_back(Milliseconds(*answer.first_output() - record.scheduled));
  // An answer that came in one event says nothing about the time of a token.
  if (answer.output_events() > 1 && output_tokens > 1) {
    per_output_token_ms.push_back(Milliseconds(*answer.last_output() - *answer.first_output()) /
                                  static_cast<double>(output_tokens - 1));
  }
  gap_ms.insert(gap_ms.end(), answer.gaps_ms().begin(), answer.gaps_ms().end());
}

}  // namespace minke::cli::bench
