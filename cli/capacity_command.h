// `minke plan`: how many attention nodes and expert servers to run, what they reach and cost, and what bounds
// them (docs/planner.md).
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace minke::cli {

struct CapacityFlags {
  std::string gpu = "h200";
  std::string attention_gpu, expert_gpu;  // empty: gpu
  std::string ceilings, attention_ceilings, expert_ceilings;
  double memory_gb = 0, attention_memory_gb = 0, expert_memory_gb = 0;  // 0: of the ceilings
  bool gpu_rows = false, no_crossings = false;

  double context = 0;  // 0: from prompt and output
  double prompt_tokens = 2048, output_tokens = 512, cached_share = 0;
  double tpot_ms = 0, ttft_ms = 0;              // 0: any
  double tokens_per_s = 0, requests_per_s = 0;  // 0: none
  double attention_price = 1, expert_price = 1, router_price = 0;

  double network_gb_s = 50, latency_us = 10;
  std::string routing = "remote";
  double router_gflop_s = 1200;
  double imbalance = 1.2, merged = 1, memory_share = 0.95;
  int spare_slots = 0;
  int64_t step_tokens = 2048;
  int nodes_max = 128, microbatches_max = 4;
  int attention = 0, experts = 0, microbatches = 0;  // 0: to be found
  int64_t sequences = 0;
};

// Adds the flags; each excludes `simulate`, the other form of the command.
void AddCapacityFlags(CLI::App& app, CapacityFlags& flags, CLI::Option* simulate);

// What both forms of the command share.
struct PlanModel {
  std::string checkpoint;  // folder whose config.json gives the shape; empty: `name`
  std::string name = "v2";
  std::string experts_format = "bf16";
  int replicas = 1;
};
// The table goes to `out`, or to stderr if the JSON does. FAILED_PRECONDITION if nothing does what is asked.
absl::Status RunPlanCapacity(const CapacityFlags& flags, const PlanModel& model, const std::string& json,
                             std::ostream& out);

}  // namespace minke::cli
