// Which pools to run: every size and number of microbatches is tried, with as many sequences as fit the
// memory and the wanted latency (docs/planner.md, "The search"). Pure.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "cli/plan/capacity.h"

namespace minke::cli {

struct SearchOptions {
  int nodes_max = 128;  // of either pool
  int microbatches_max = 4;
  // Given instead of looked for; 0: looked for. `sequences` are of an attention node.
  int attention = 0, experts = 0, microbatches = 0;
  int64_t sequences = 0;
  double target_tokens_per_s = 0;  // 0: the unit with the best price
  int clusters_max = 64;           // for a target that one cluster does not reach
  // A unit costs at most so many times the best price per token; smaller units are preferred within that.
  double price_slack = 1.05;
};

struct Plan {
  Pools pools;
  StepTime step;
  double first_token_s = 0;  // 0: no prompts
  int routers = 1;
  double tokens_per_s = 0;  // generated, at full load
  double price_per_hour = 0;
  double price_per_million = 0;  // generated tokens, at full load

  // With a target: pools as above are enough, and one machine more of each is there to be lost.
  int clusters = 1;
  int spare_attention = 0, spare_experts = 0;
  double target_tokens_per_s = 0;  // of one cluster
  double target_step_s = 0;        // time per output token at that load, with all machines
  double target_sequences = 0;     // decoding per attention node then
};

struct SearchResult {
  Plan best;
  std::vector<Plan> others;  // cheaper and dearer ones an hour, none worse in both price and throughput
};

// FAILED_PRECONDITION naming what does not fit, the term that alone exceeds it, and the least possible.
absl::StatusOr<SearchResult> Search(const CapacityModel& model, const SearchOptions& options);

// Of given pools; `sequences` is taken as it is.
Plan Evaluate(const CapacityModel& model, const Pools& pools);

}  // namespace minke::cli
