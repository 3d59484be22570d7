#include "services/router/placement/step_time.h"

#include <algorithm>
#include <cmath>

#include "libs/base/status.h"

namespace minke::router {

UnitShape ShapeOfUnits(const ModelConfig& config, double element_bytes) {
  if (config.n_routed_experts == 0) return {};
  // gate, up and down: three matrices of hidden x width; a multiply and an add per weight and row.
  const double expert_weights = 3.0 * config.hidden_size * config.moe_intermediate_size;
  UnitShape shape;
  shape.experts = config.GroupExperts(config.placement_groups() - 1).size();  // of the largest
  shape.unit_bytes = shape.experts * expert_weights * element_bytes;
  shape.experts_per_row = double{1.0} * config.num_experts_per_tok / config.fan_out_max();
  shape.flops_per_row = shape.experts_per_row * 2 * expert_weights;
  return shape;
}

ServerRate RateOf(const UnitShape& shape, const ServerSnapshot& server) {
  return {shape.expert_bytes() / (server.bytes_per_s * server.speed),
          shape.flops_per_row / (server.flops_per_s * server.speed)};
}

double ExpertsTouchedEvenly(const UnitShape& shape, double rows) {
  if (shape.experts <= 1) return rows > 0 ? std::min(1.0, rows) : 0;
  return -shape.experts * std::expm1(rows * shape.experts_per_row * std::log1p(-1 / shape.experts));
}

double ExpertsTouched(const UnitShape& shape, const UnitLoad& load) {
  return load.experts > 0 ? std::min(load.experts, shape.experts) : ExpertsTouchedEvenly(shape, load.rows);
}

double ExpertsTouched(const UnitShape& shape, const UnitLoad& load, double rows) {
  if (rows <= 0) return 0;
  if (rows >= load.rows) return ExpertsTouched(shape, load);
  return ExpertsTouched(shape, load) * ExpertsTouchedEvenly(shape, rows) /
         ExpertsTouchedEvenly(shape, load.rows);
}

double RidgeRowsPerExpert(const UnitShape& shape, std::span<const ServerSnapshot> servers) {
  double sum = 0, count = 0;
  for (const ServerSnapshot& server : servers) {
    const ServerRate rate = RateOf(shape, server);
    if (server.draining || rate.row_s <= 0) continue;
    sum += rate.expert_read_s / (rate.row_s / shape.experts_per_row);
    ++count;
  }
  return count > 0 ? sum / count : std::numeric_limits<double>::infinity();
}

StepTime PredictStep(const PlacementSnapshot& snapshot,
                     const std::map<UnitId, std::vector<Replica>>& weights) {
  std::map<NodeId, ServerRate> rates;
  for (const ServerSnapshot& server : snapshot.servers) rates[server.id] = RateOf(snapshot.shape, server);
  std::map<uint32_t, std::map<NodeId, double>> times;  // by layer
  for (const UnitLoad& load : snapshot.units) {
    auto found = weights.find(load.unit);
    if (found == weights.end()) continue;
    for (const Replica& replica : found->second) {
      auto rate = rates.find(replica.server);
      MK_CHECK(rate != rates.end());
      const double rows = load.rows * replica.weight;
      times[load.unit.layer][replica.server] +=
          rate->second.expert_read_s * ExpertsTouched(snapshot.shape, load, rows) + rate->second.row_s * rows;
    }
  }
  StepTime step;
  for (const auto& [layer, servers] : times) {
    double max = 0, sum = 0;
    for (const auto& [server, time] : servers) max = std::max(max, time), sum += time;
    step.max_s += max;
    step.mean_s += sum / static_cast<double>(servers.size());
  }
  return step;
}

}  // namespace minke::router
