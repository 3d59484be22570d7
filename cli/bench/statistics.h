// What a run measured, from single requests to percentiles.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cli/bench/answer_reader.h"

namespace minke::cli::bench {

// Smallest sample that at least `percent` of all samples do not exceed (nearest rank): always a value that
// was measured. Reorders `samples`. REQUIRES: samples not empty, 0 < percent <= 100.
double Percentile(std::vector<double>& samples, double percent);

struct Summary {
  int64_t count = 0;  // 0: the others mean nothing
  double mean = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;
};
Summary Summarise(std::vector<double> samples);

enum class Outcome { kCompleted, kFailed, kInterrupted };

// One request, as it went.
struct RequestRecord {
  Outcome outcome = Outcome::kFailed;
  std::string error_kind;                      // "http_429", "timeout", ...; empty unless kFailed
  std::string error_text;                      // the first of each kind is shown
  Clock::time_point scheduled;                 // when it should begin; closed loop: when it began
  Clock::time_point sent;                      // when it began
  Clock::time_point end;                       // [DONE], or the failure
  std::optional<int64_t> prompt_tokens_asked;  // what the prompt was made for
  AnswerReader answer;
};

// How token counts were come by, the more trusted first.
enum class CountedBy { kUsage, kTokenIds, kEvents, kRequest, kUnknown };
std::string ToString(CountedBy counted_by);

struct TokenCount {
  int64_t tokens = 0;
  std::map<CountedBy, int64_t> requests;  // how many of them were counted that way
};

// Thread-compatible.
class RunStatistics {
 public:
  void Add(const RequestRecord& record);

  int64_t completed = 0, failed = 0, interrupted = 0;
  struct Errors {
    int64_t count = 0;
    std::string example;
  };
  std::map<std::string, Errors> errors;  // by kind

  // All below: of completed requests only.
  TokenCount prompt, output;
  std::optional<int64_t> cached_tokens;  // of the prompts, if the server says
  int64_t without_output = 0;  // whole answers without any output event: they have no time to first token
  // Milliseconds from `scheduled`; time per output token and gaps are differences.
  std::vector<double> first_token_ms, per_output_token_ms, gap_ms, total_ms;
  std::vector<double> send_delay_ms;  // from scheduled to sent
  double busy_s = 0;  // sum over all requests, failed ones too, of the time they were under way
};

}  // namespace minke::cli::bench
