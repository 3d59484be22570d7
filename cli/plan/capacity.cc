#include "cli/plan/capacity.h"

#include <algorithm>
#include <cmath>

#include "libs/base/status.h"

namespace minke::cli {
namespace {

constexpr double kPageTokens = 64;          // of the latent cache
constexpr double kUnitsPerMovingSlot = 16;  // services/router/placement/coordinator.cc
constexpr double kPrefillLaunchRows = 512;  // ExpertEngineOptions
constexpr double kLaunchRows = 4096;        // of decoding rows, the same
constexpr double kRouterLoad = 0.7;         // of a router's arithmetic and network that may be used
constexpr double kCrossingRows = 3;         // a row down in bf16, its sum up in f32
// Of an expert server on a GPU: 460 MB for a launch of V2 (docs/gpu.md), here by the row. Of an attention
// node: an estimate, 210 MB for V2.
constexpr double kLaunchWorkspaceRows = 11, kAttentionWorkspaceRows = 10;

}  // namespace

std::string_view BoundName(Bound bound) {
  switch (bound) {
    case Bound::kAttention:
      return "attention";
    case Bound::kCrossing:
      return "crossing";
    case Bound::kExperts:
      return "experts";
    case Bound::kNetwork:
      return "network";
    case Bound::kLatency:
      return "latency";
  }
  return "";
}

CapacityModel::CapacityModel(const ModelConfig& config, const Hardware& hardware, const Workload& workload)
    : hardware_(hardware), workload_(workload), cost_(CostOf(config, hardware.format)) {
  for (int servers = 1; servers <= cost_.groups; ++servers) fan_out_.push_back(FanOutOver(config, servers));
}

double CapacityModel::ExpertFlops() const {
  return hardware_.format == ExpertsFormat::kFP8 ? hardware_.expert.expert_fp8_flops
                                                 : hardware_.expert.expert_flops;
}
double CapacityModel::ExpertBytesPerS() const {
  return hardware_.format == ExpertsFormat::kFP8 ? hardware_.expert.expert_fp8_bytes_per_s
                                                 : hardware_.expert.expert_bytes_per_s;
}

// One launch of `units` units of a layer, with `group_rows` (row, group) pairs each.
CapacityModel::UnitTime CapacityModel::LaunchSeconds(double units, double group_rows) const {
  if (units <= 0 || group_rows <= 0) return {};
  const Ceilings& c = hardware_.expert;
  const double pairs_per_group_row = cost_.experts_per_row / cost_.groups_per_row;
  // As if a row chose evenly: rows of the layer that bring a unit so many pairs.
  const double layer_rows = group_rows * cost_.groups / cost_.groups_per_row;
  const double experts = static_cast<double>(cost_.experts) / cost_.groups;
  const double bytes = units * experts * cost_.TouchedShare(layer_rows) * cost_.expert_bytes;
  const double flops = units * group_rows * pairs_per_group_row * cost_.expert_flops;
  UnitTime time;
  time.reading_s = bytes / ExpertBytesPerS();
  time.seconds = c.Roof(bytes, ExpertBytesPerS(), flops, ExpertFlops()) + c.launch_s;
  if (c.launch_bytes_per_s > 0)
    time.seconds += units * group_rows * 2 * cost_.row_bytes / c.launch_bytes_per_s;
  return time;
}

StepTime CapacityModel::Step(const Pools& pools, double prompt_rows) const {
  const Ceilings& a = hardware_.attention;
  const double m = pools.microbatches, nodes = pools.attention, servers = pools.experts;
  const double rows = static_cast<double>(pools.sequences) / m;  // decoding, of a microbatch
  const double prompts = prompt_rows / m;
  const double mean_prompts =
      static_cast<double>(pools.sequences) * workload_.prompt_rows_per_token() / m;  // of other nodes
  const double all = rows + prompts;
  StepTime step;
  LayerTimes& layer = step.layer;

  const auto linear = [&](double bytes, double flops) {
    return a.Roof(bytes, a.read_bytes_per_s, all * flops, a.product_flops);
  };
  // Of a prompt's row the context is half the prompt.
  const double core =
      rows * workload_.context *
          std::max(cost_.core_flops / a.decode_flops, cost_.latent_bytes / a.read_bytes_per_s) +
      prompts * workload_.prompt_tokens / 2 * cost_.naive_core_flops / a.prefill_flops;
  layer.attention_s = linear(cost_.attention_bytes, cost_.attention_flops) + core + a.layer_s;
  layer.shared_s = cost_.shared_flops > 0 ? linear(cost_.shared_bytes, cost_.shared_flops) : 0;
  layer.crossing_s = a.crossing_s;
  if (a.crossing_bytes_per_s > 0)
    layer.crossing_s += all * kCrossingRows * cost_.row_bytes / a.crossing_bytes_per_s;
  layer.router_s = all * cost_.gate_flops / hardware_.router_flops;

  // Experts. Decoding rows of the nodes that meet are one launch; prompts have launches of their own.
  const double met = 1 + hardware_.merged * (nodes - 1);
  const double phi = hardware_.imbalance, groups = cost_.groups;
  const double copies = std::min<double>(hardware_.replicas, servers);
  const double of_group = cost_.groups_per_row / groups;  // share of rows that reach a given group
  const double launch_rows = phi * rows * met * of_group;
  step.rows_per_expert = rows * met * cost_.experts_per_row / cost_.experts;
  // A layer's groups over its servers: all rows of a unit to one replica, or split over all of them.
  const auto spread = [&](double replicas, UnitTime& slowest, double& busy) {
    const double units = std::ceil(groups * replicas / servers);
    slowest = LaunchSeconds(units, launch_rows / replicas);
    // Launches hold at most so many rows; more are several.
    const double passes = std::max(1.0, units * launch_rows / replicas / kLaunchRows);
    slowest.seconds += (passes - 1) * hardware_.expert.launch_s;
    busy = LaunchSeconds(1, launch_rows / replicas).seconds * groups * replicas / servers * nodes / met;
  };
  UnitTime slowest, split;
  double busy = 0, split_busy = 0;
  spread(1, slowest, busy);
  // Below the rows at which arithmetic takes as long as reading, all go to one replica.
  const double ridge = SaturatingRows() * cost_.experts_per_row / cost_.experts;
  if (copies > 1 && phi * step.rows_per_expert > ridge) {
    spread(copies, split, split_busy);
    if (split.seconds < slowest.seconds) slowest = split, busy = split_busy;
  }
  // Prompts come in chunks of what a step has room for, and have launches of the rows that a chunk brings a
  // unit.
  double prompt_s = 0, prompt_busy = 0;
  if (prompts > 0 || mean_prompts > 0) {
    const double chunk = std::clamp<double>(static_cast<double>(workload_.step_tokens - pools.sequences), 1,
                                            workload_.prompt_tokens) /
                         m;
    const double per_launch = std::clamp(chunk * of_group, 1.0, kPrefillLaunchRows);
    const double per_row = LaunchSeconds(1, per_launch).seconds / per_launch * phi;
    const double total = (prompts + mean_prompts * (nodes - 1)) * of_group * groups / servers;
    prompt_busy = per_row * total;
    prompt_s = per_row * prompts * of_group * std::ceil(groups / servers);
  }
  layer.experts_s = slowest.seconds + prompt_s;
  layer.experts_reading_s = slowest.reading_s;
  layer.experts_busy_s = busy + prompt_busy;

  // Network: a row to the router once (or from here straight to each server), its servers once each, a sum
  // per (row, group) back.
  const double fan_out = fan_out_[std::min<size_t>(fan_out_.size(), pools.experts) - 1];
  const double row_s = cost_.row_bytes / hardware_.network_bytes_per_s;
  const bool remote = hardware_.crossings > 2;
  const double out = all * (remote ? 1 : fan_out) * row_s, back = all * cost_.groups_per_row * row_s;
  layer.network_s = hardware_.crossings * hardware_.network_latency_s + out + back;
  if (remote) layer.network_s += all * fan_out * row_s;
  const double others = all + (nodes - 1) * (rows + mean_prompts);
  const double server_nic = phi * others * std::max(fan_out, cost_.groups_per_row) * row_s / servers;
  layer.nic_busy_s = std::max({out, back, server_nic});

  // A microbatch's way through the layer, and what each part does for all of them.
  const double way = layer.attention_s + std::max(layer.shared_s, layer.crossing_s + layer.router_s +
                                                                      layer.network_s + layer.experts_s);
  const std::pair<double, Bound> bounds[] = {{m * (layer.attention_s + layer.shared_s), Bound::kAttention},
                                             {m * layer.crossing_s, Bound::kCrossing},
                                             {m * layer.experts_busy_s, Bound::kExperts},
                                             {m * layer.nic_busy_s, Bound::kNetwork},
                                             {way, Bound::kLatency}};
  step.layer_round_s = 0;
  for (const auto& [seconds, bound] : bounds) {
    if (seconds > step.layer_round_s) step.layer_round_s = seconds, step.bound = bound;
  }
  if (cost_.dense_layers > 0)
    step.dense_s =
        cost_.dense_layers * m * (layer.attention_s + linear(cost_.dense_bytes, cost_.dense_flops));
  // Of a prompt only the last row needs logits.
  step.head_s =
      m * a.Roof(cost_.embedding_bytes, a.read_bytes_per_s, rows * cost_.head_flops, a.product_flops);
  step.step_s = cost_.moe_layers * step.layer_round_s + step.dense_s + step.head_s;
  step.prompt_rows = prompt_rows;
  return step;
}

StepTime CapacityModel::Steady(const Pools& pools) const {
  return Step(pools, static_cast<double>(pools.sequences) * workload_.prompt_rows_per_token());
}

double CapacityModel::TimeToFirstToken(const Pools& pools, const StepTime& steady) const {
  if (workload_.prompt_tokens <= 0) return 0;
  const double chunk = static_cast<double>(workload_.step_tokens - pools.sequences);
  if (chunk <= 0) return kNone;
  const double steps = std::ceil(workload_.prompt_tokens / chunk);
  // A request arrives in the middle of a step.
  return steady.step_s / 2 + steps * Step(pools, std::min(chunk, workload_.prompt_tokens)).step_s;
}

int64_t CapacityModel::SequencesMax() const {
  const double pages = std::ceil(workload_.tokens_max / kPageTokens);
  const double room = AttentionMemory({.sequences = 0}).total - AttentionMemory({.sequences = 0}).used();
  if (room < 0) return -1;
  return static_cast<int64_t>(room / (pages * kPageTokens * cost_.latent_bytes_per_token()));
}

int64_t CapacityModel::SlotsOf(int servers) const {
  const int64_t copies = cost_.units() * std::min(hardware_.replicas, servers);
  const int64_t part = (copies + servers - 1) / servers;
  return part + hardware_.spare_slots +
         static_cast<int64_t>(std::ceil(static_cast<double>(part) / kUnitsPerMovingSlot));
}

Memory CapacityModel::AttentionMemory(const Pools& pools) const {
  const double pages = std::ceil(workload_.tokens_max / kPageTokens);
  return {
      .weights = cost_.attention_node_bytes(),
      .cache = static_cast<double>(pools.sequences) * pages * kPageTokens * cost_.latent_bytes_per_token(),
      .workspace = kAttentionWorkspaceRows * static_cast<double>(workload_.step_tokens) * cost_.row_bytes,
      .total = hardware_.attention.memory_bytes * hardware_.memory_share};
}

Memory CapacityModel::ExpertMemory(int servers) const {
  return {.weights = static_cast<double>(SlotsOf(servers)) * cost_.unit_bytes,
          .workspace = kLaunchWorkspaceRows * kLaunchRows * cost_.row_bytes,
          .total = hardware_.expert.memory_bytes * hardware_.memory_share};
}

int CapacityModel::ExpertServersMin(int most) const {
  int servers = std::max(1, hardware_.replicas);
  while (servers <= most && ExpertMemory(servers).share() > 1) ++servers;
  return servers;
}

int CapacityModel::RoutersFor(const Pools& pools, const StepTime& steady) const {
  if (hardware_.crossings <= 2) return 1;
  const double rows_per_s = pools.attention * (static_cast<double>(pools.sequences) + steady.prompt_rows) *
                            cost_.moe_layers / steady.step_s;
  const double fan_out = fan_out_[std::min<size_t>(fan_out_.size(), pools.experts) - 1];
  const double gate = rows_per_s * cost_.gate_flops / hardware_.router_flops;
  const double nic = rows_per_s * fan_out * cost_.row_bytes / hardware_.network_bytes_per_s;
  return std::max(1, static_cast<int>(std::ceil(std::max(gate, nic) / kRouterLoad)));
}

double CapacityModel::AttentionSecondsPerRow(bool with_shared) const {
  const Ceilings& a = hardware_.attention;
  return (cost_.attention_flops + (with_shared ? cost_.shared_flops : 0)) / a.product_flops +
         workload_.context *
             std::max(cost_.core_flops / a.decode_flops, cost_.latent_bytes / a.read_bytes_per_s);
}

double CapacityModel::ExpertSecondsPerRow() const {
  return cost_.experts_per_row * cost_.expert_flops / ExpertFlops();
}

double CapacityModel::SaturatedRatio() const {
  return AttentionSecondsPerRow(true) / (hardware_.imbalance * ExpertSecondsPerRow());
}

double CapacityModel::SaturatingRows() const {
  const double rows_per_expert =
      cost_.expert_bytes / ExpertBytesPerS() / (cost_.expert_flops / ExpertFlops());
  return rows_per_expert * cost_.experts / cost_.experts_per_row;
}

}  // namespace minke::cli
