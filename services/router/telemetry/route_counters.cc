#include "services/router/telemetry/route_counters.h"

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <utility>

#include "libs/base/status.h"

namespace minke::router {
namespace {

constexpr int64_t kGroupsMax = 64;  // of a model: docs/limits.md

std::vector<double> FanOutBuckets(int32_t limit) {
  std::vector<double> bounds;
  for (int32_t servers = 1; servers <= std::max(limit, 8); ++servers) bounds.push_back(servers);
  return bounds;
}

}  // namespace

RouteCounters::RouteCounters(const ModelConfig& config)
    : config_(config),
      layers_(config.MoeLayers()),
      experts_(config.n_routed_experts),
      groups_(config.n_routed_experts > 0 ? config.placement_groups() : 0),
      index_of_layer_(config.num_hidden_layers, -1),
      rows_(new Counter[layers_.size()]()),
      selections_(new Counter[layers_.size() * experts_]()),
      unit_rows_(new Counter[layers_.size() * groups_]()),
      scores_(new std::atomic<double>[layers_.size() * experts_]()) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    index_of_layer_[layers_[i]] = static_cast<int32_t>(i);
    fan_out_.push_back(std::make_unique<telemetry::Histogram>(FanOutBuckets(config.fan_out_max())));
  }
  window_.push_back({absl::InfinitePast(), Load()});
}

void RouteCounters::Count(int32_t layer, int64_t rows, const uint16_t* experts, const GateResult* results,
                          const float* scores, std::span<const NodeId> servers) {
  const size_t at = index_of_layer_[layer];
  const size_t k = config_.num_experts_per_tok;
  score_sums_.assign(experts_, 0);
  uint64_t routed = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (results[row] == GateResult::kRejected) continue;
    ++routed;
    std::array<uint32_t, kGroupsMax> pairs{};
    for (size_t e = 0; e < k; ++e) {
      const uint16_t expert = experts[row * k + e];
      Add(selections_[at * experts_ + expert], 1);
      ++pairs[config_.GroupOfExpert(expert)];
    }
    const float* row_scores = scores + row * experts_;
    for (size_t e = 0; e < experts_; ++e) score_sums_[e] += row_scores[e];
    std::array<NodeId, kGroupsMax> reached;
    size_t count = 0;
    for (size_t g = 0; g < groups_; ++g) {
      if (pairs[g] == 0) continue;
      Add(unit_rows_[at * groups_ + g], 1);
      const NodeId server = servers[row * groups_ + g];
      if (server == NodeId{}) continue;
      PerServer& counters =
          servers_.Get(server, [&] { return std::make_unique<PerServer>(layers_.size(), groups_); });
      Add(counters.pairs[at * groups_ + g], pairs[g]);
      if (std::find(reached.begin(), reached.begin() + count, server) != reached.begin() + count) continue;
      reached[count++] = server;
      Add(counters.rows[at], 1);
    }
    if (count > 0) fan_out_[at]->Observe(static_cast<double>(count));
    if (count > static_cast<size_t>(config_.fan_out_max())) Add(fan_out_violations_, 1);
  }
  Add(rows_[at], routed);
  for (size_t e = 0; e < experts_; ++e) {
    std::atomic<double>& sum = scores_[at * experts_ + e];
    sum.store(sum.load(std::memory_order_relaxed) + score_sums_[e], std::memory_order_relaxed);
  }
}

void RouteCounters::SetPlacement(std::shared_ptr<const PlacementTable> placement) {
  const MutexLock lock(mutex_);
  placement_ = std::move(placement);
}

std::vector<LayerLoad> RouteCounters::Load() const {
  std::vector<LayerLoad> loads(layers_.size());
  for (size_t at = 0; at < layers_.size(); ++at) {
    LayerLoad& load = loads[at];
    load.rows = rows_[at].load(std::memory_order_relaxed);
    for (size_t e = 0; e < experts_; ++e) {
      load.selections.push_back(selections_[at * experts_ + e].load(std::memory_order_relaxed));
      load.scores.push_back(scores_[at * experts_ + e].load(std::memory_order_relaxed));
    }
  }
  servers_.ForEach([&](NodeId server, const PerServer& counters) {
    for (size_t at = 0; at < layers_.size(); ++at) {
      ServerLoad& load = loads[at].servers.emplace_back();
      load.server = server;
      load.rows = counters.rows[at].load(std::memory_order_relaxed);
      for (size_t g = 0; g < groups_; ++g)
        load.pairs.push_back(counters.pairs[at * groups_ + g].load(std::memory_order_relaxed));
    }
  });
  return loads;
}

void RouteCounters::Tick(absl::Time now) {
  {
    const MutexLock lock(mutex_);
    if (now - window_.back().at < kWindowPart) return;
  }
  Part part{now, Load()};
  const MutexLock lock(mutex_);
  window_.push_back(std::move(part));
  while (window_.size() > kWindowParts) window_.pop_front();
}

// Servers to which the layer's rows may go: published with a weight, or without any weights.
int64_t RouteCounters::ServersOf(uint32_t layer) const {
  std::set<NodeId> servers;
  if (placement_ == nullptr) return 0;
  for (uint32_t g = 0; g < groups_; ++g) {
    const auto unit = placement_->units().find(UnitId{layer, g});
    if (unit == placement_->units().end()) continue;
    const auto& [nodes, weights] = unit->second;
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (weights.empty() || weights[i] > 0) servers.insert(nodes[i]);
    }
  }
  return std::ssize(servers);
}

std::vector<std::optional<LayerBalance>> RouteCounters::Balance() const {
  const std::vector<LayerLoad> now = Load();
  const BalanceShape shape{config_.num_experts_per_tok, config_.fan_out_max()};
  std::vector<std::optional<LayerBalance>> balance(now.size());
  const MutexLock lock(mutex_);
  for (size_t at = 0; at < now.size(); ++at) {
    const LayerLoad load = Since(now[at], window_.front().loads[at]);
    if (load.rows > 0) balance[at] = ComputeBalance(shape, load, ServersOf(layers_[at]));
  }
  return balance;
}

std::vector<std::vector<uint64_t>> RouteCounters::Selections() const {
  std::vector<std::vector<uint64_t>> counts(layers_.size(), std::vector<uint64_t>(experts_));
  for (size_t at = 0; at < counts.size(); ++at) {
    for (size_t e = 0; e < experts_; ++e)
      counts[at][e] = selections_[at * experts_ + e].load(std::memory_order_relaxed);
  }
  return counts;
}

std::vector<uint64_t> RouteCounters::UnitRows() const {
  std::vector<uint64_t> rows(layers_.size() * groups_);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = unit_rows_[i].load(std::memory_order_relaxed);
  return rows;
}

void RouteCounters::Collect(telemetry::Page& page) const {
  const auto layer_of = [&](size_t at) { return std::to_string(layers_[at]); };
  const auto read = [](const Counter& counter) {
    return static_cast<double>(counter.load(std::memory_order_relaxed));
  };
  for (size_t at = 0; at < layers_.size(); ++at) {
    for (size_t e = 0; e < experts_; ++e) {
      page.Counter("minke:expert_selections_total", "Rows for which the gate chose the expert",
                   read(selections_[at * experts_ + e]),
                   {{"layer", layer_of(at)}, {"expert", std::to_string(e)}});
    }
    for (size_t g = 0; g < groups_; ++g) {
      page.Counter("minke:group_rows_total", "Rows that were routed to an expert of the group",
                   read(unit_rows_[at * groups_ + g]),
                   {{"layer", layer_of(at)}, {"group", std::to_string(g)}});
    }
    page.Add("minke:fan_out_servers", "Expert servers that a row was sent to", fan_out_[at]->Snapshot(),
             {{"layer", layer_of(at)}});
  }
  page.Declare("minke:server_rows_total", "Rows sent to the expert server, each once",
               telemetry::MetricType::kCounter);
  servers_.ForEach([&](NodeId server, const PerServer& counters) {
    for (size_t at = 0; at < layers_.size(); ++at) {
      page.Counter("minke:server_rows_total", "Rows sent to the expert server, each once",
                   read(counters.rows[at]), {{"layer", layer_of(at)}, {"server", ToString(server)}});
    }
  });
  page.Counter("minke:fan_out_violations_total",
               "Rows sent to more expert servers than the model's routing allows", read(fan_out_violations_));
  page.Gauge("minke:fan_out_limit", "Expert servers that a row reaches at most", config_.fan_out_max());

  const std::vector<std::optional<LayerBalance>> balance = Balance();
  const auto gauge = [&](const char* name, const char* help, auto value, const char* kind = nullptr) {
    page.Declare(name, help, telemetry::MetricType::kGauge);
    for (size_t at = 0; at < balance.size(); ++at) {
      if (!balance[at].has_value()) continue;
      telemetry::Labels labels = {{"layer", layer_of(at)}};
      if (kind != nullptr) labels.emplace_back("kind", kind);
      page.Gauge(name, help, value(*balance[at]), std::move(labels));
    }
  };
  constexpr char kFactor[] = "minke:balance_factor";
  constexpr char kFactorHelp[] =
      "The paper's balance losses without their factors, over the last half minute";
  gauge(
      kFactor, kFactorHelp, [](const LayerBalance& b) { return b.expert; }, "expert");
  gauge(
      kFactor, kFactorHelp, [](const LayerBalance& b) { return b.device; }, "device");
  gauge(
      kFactor, kFactorHelp, [](const LayerBalance& b) { return b.communication; }, "communication");
  gauge("minke:over_budget_fraction",
        "Part of the (row, expert) pairs above a server's even share, last half minute",
        [](const LayerBalance& b) { return b.over_budget_fraction; });
  gauge("minke:expert_load_max", "Load of the busiest expert over the mean, last half minute",
        [](const LayerBalance& b) { return b.expert_load_max; });
  gauge("minke:device_load_max", "Load of the busiest expert server over the mean, last half minute",
        [](const LayerBalance& b) { return b.device_load_max; });
}

}  // namespace minke::router
