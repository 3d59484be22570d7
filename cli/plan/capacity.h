// How long a decode step of a cluster takes, and what bounds it: the arithmetic of docs/planner.md. Pure.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "cli/plan/ceilings.h"
#include "cli/plan/model_cost.h"
#include "libs/model/config.h"

namespace minke::cli {

inline constexpr double kNone = std::numeric_limits<double>::infinity();

// What is asked of the cluster and what it is made of.
struct Workload {
  double context = 4096;       // tokens before the one decoded, on average
  double tokens_max = 4096;    // of a sequence, prompt and output: what the cache must hold
  double prompt_tokens = 0;    // computed per sequence (less what the prefix cache has); 0: decoding alone
  double output_tokens = 0;    // per sequence; > 0 if prompt_tokens is
  int64_t step_tokens = 2048;  // rows of a step, sequences and prompts together, at most
  double tpot_slo_s = kNone;   // time per output token
  double ttft_slo_s = kNone;   // time to first token

  double prompt_rows_per_token() const { return prompt_tokens > 0 ? prompt_tokens / output_tokens : 0; }
};

struct Hardware {
  Ceilings attention, expert;
  ExpertsFormat format = ExpertsFormat::kBF16;
  double network_bytes_per_s = 50e9;  // of a node, each way
  double network_latency_s = 10e-6;   // of one crossing, from one process to another
  int crossings = 3;                  // attention, router, experts, attention; 2 with --routing local
  double router_flops = 1.2e12;       // gate of one router
  double imbalance = 1.2;             // phi: rows of the busiest expert server over the mean
  double merged = 1;                  // share of the other attention nodes whose rows meet in one launch
  int replicas = 1;                   // of every (layer, group)
  int spare_slots = 0;                // of an expert server
  double memory_share = 0.95;         // of a node's memory that may be used
  double attention_price = 1, expert_price = 1, router_price = 0;  // an hour
};

struct Pools {
  int attention = 1, experts = 1, microbatches = 1;
  int64_t sequences = 1;  // decoding, per attention node
};

// Where a node's memory goes, bytes.
struct Memory {
  double weights = 0, cache = 0, workspace = 0, total = 0;
  double used() const { return weights + cache + workspace; }
  double share() const { return used() / total; }
};

enum class Bound { kAttention, kCrossing, kExperts, kNetwork, kLatency };
std::string_view BoundName(Bound bound);

// Seconds of one microbatch in one MoE layer, on average over a step.
struct LayerTimes {
  double attention_s = 0;        // until its rows are sent
  double shared_s = 0;           // shared experts, while the rows are away
  double crossing_s = 0;         // the attention node's host thread
  double router_s = 0;           // the gate
  double network_s = 0;          // all crossings, one after the other
  double experts_s = 0;          // of the layer's slowest server
  double experts_busy_s = 0;     // of a server's time, on average over servers
  double experts_reading_s = 0;  // of experts_s, if there was nothing but reading weights
  double nic_busy_s = 0;         // of the busiest node's network
};

struct StepTime {
  LayerTimes layer;
  double layer_round_s = 0;  // until all microbatches are through an MoE layer
  Bound bound{};
  double dense_s = 0, head_s = 0;  // of a step
  double step_s = 0;
  double prompt_rows = 0;      // of a step and attention node, on average
  double rows_per_expert = 0;  // of a launch of decoding rows
};

class CapacityModel {
 public:
  CapacityModel(const ModelConfig& config, const Hardware& hardware, const Workload& workload);

  const ModelCost& cost() const { return cost_; }
  const Hardware& hardware() const { return hardware_; }
  const Workload& workload() const { return workload_; }

  // A step in which each attention node decodes its sequences and computes `prompt_rows` of prompts; the
  // others' prompt rows are the average.
  StepTime Step(const Pools& pools, double prompt_rows) const;
  // With the prompt rows that a steady state brings: each sequence's prompt over its output.
  StepTime Steady(const Pools& pools) const;

  // From a request's arrival at a node that is not overloaded to its first token; 0 without prompts, kNone if
  // sequences leave a step no room for them.
  double TimeToFirstToken(const Pools& pools, const StepTime& steady) const;

  int64_t SequencesMax() const;  // that fit an attention node; negative: its weights do not
  int64_t SlotsOf(int servers) const;
  Memory AttentionMemory(const Pools& pools) const;
  Memory ExpertMemory(int servers) const;
  int ExpertServersMin(int most) const;  // fewest that hold all units; most + 1: not even that many
  int RoutersFor(const Pools& pools, const StepTime& steady) const;

  // N_a / N_e at which both pools are saturated with arithmetic: t_a / (phi t_e).
  double SaturatedRatio() const;
  double AttentionSecondsPerRow(bool with_shared) const;  // t_a
  double ExpertSecondsPerRow() const;                     // t_e
  // Rows of all attention nodes from which experts are bound by arithmetic.
  double SaturatingRows() const;

 private:
  struct UnitTime {
    double seconds = 0, reading_s = 0;
  };
  UnitTime LaunchSeconds(double units, double group_rows) const;  // group_rows: (row, group) pairs per unit
  double ExpertFlops() const;
  double ExpertBytesPerS() const;

  const Hardware hardware_;
  const Workload workload_;
  const ModelCost cost_;
  std::vector<double> fan_out_;  // by servers of a layer, from 1
};

}  // namespace minke::cli
