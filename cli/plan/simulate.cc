#include "cli/plan/simulate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <span>

#include "services/router/placement/policy.h"
#include "services/router/placement/step_time.h"

namespace minke::cli {
namespace {

using router::HostedUnit;
using router::Move;
using router::PlacementPlan;
using router::PlacementSnapshot;
using router::Replica;
using router::ServerSnapshot;
using router::StepTime;
using router::UnitLoad;
using Weights = std::map<UnitId, std::vector<Replica>>;

// Servers on which moves are carried out.
class Pool {
 public:
  Pool(PlacementSnapshot snapshot, const SimulateOptions& options)
      : snapshot_(std::move(snapshot)), options_(options) {
    for (size_t i = 0; i < snapshot_.servers.size(); ++i) index_[snapshot_.servers[i].id] = i;
  }
  PlacementSnapshot& snapshot() { return snapshot_; }

  // Everything desired is loaded.
  void Begin(const PlacementPlan& plan) {
    for (const auto& [unit, servers] : plan.desired) {
      for (const NodeId server : servers) Server(server).units.push_back({unit});
    }
  }
  void FinishLoads(double now_s) {
    for (auto it = ready_s_.begin(); it != ready_s_.end();) {
      if (it->second > now_s) {
        ++it;
        continue;
      }
      for (HostedUnit& hosted : Server(it->first.first).units) {
        if (hosted.unit == it->first.second) hosted.loaded = true;
      }
      it = ready_s_.erase(it);
    }
  }
  // A server loads one unit after another.
  void Carry(const std::vector<Move>& moves, double now_s) {
    const double load_s = snapshot_.shape.unit_bytes / options_.policy.load_bytes_per_s;
    for (const Move& move : moves) {
      ServerSnapshot& server = Server(move.server);
      if (move.kind == Move::Kind::kLoad) {
        double& free_s = free_s_[move.server];
        free_s = std::max(free_s, now_s) + load_s;
        ready_s_[{move.server, move.unit}] = free_s;
        server.units.push_back({move.unit, /*loaded=*/false});
      } else {
        std::erase_if(server.units, [&](const HostedUnit& hosted) { return hosted.unit == move.unit; });
        ready_s_.erase({move.server, move.unit});
      }
    }
  }
  void Publish(const Weights& weights) {
    for (ServerSnapshot& server : snapshot_.servers) {
      for (HostedUnit& hosted : server.units) {
        hosted.weight = 0;
        for (const Replica& replica : weights.at(hosted.unit)) {
          if (replica.server == server.id) hosted.weight = replica.weight;
        }
      }
    }
  }

 private:
  ServerSnapshot& Server(NodeId id) { return snapshot_.servers[index_.at(id)]; }

  PlacementSnapshot snapshot_;
  const SimulateOptions& options_;
  std::map<NodeId, size_t> index_;
  std::map<std::pair<NodeId, UnitId>, double> ready_s_;
  std::map<NodeId, double> free_s_;  // when its last load ends
};

// Sum over all sets of `count` groups of the product of their odds and factors.
double WaysToChoose(int count, std::span<const double> odds, std::span<const double> factors) {
  std::vector<double> ways(count + 1);
  ways[0] = 1;
  for (size_t g = 0; g < odds.size(); ++g) {
    for (int n = count; n > 0; --n) ways[n] += ways[n - 1] * odds[g] * std::max(0.0, factors[g]);
  }
  return ways[count];
}

}  // namespace

double FanOut(const PlacementSnapshot& snapshot, int groups_per_row, const Weights& weights) {
  std::map<uint32_t, std::vector<const UnitLoad*>> layers;
  for (const UnitLoad& load : snapshot.units) layers[load.unit.layer].push_back(&load);
  double reached = 0, all_rows = 0;
  for (const auto& [layer, loads] : layers) {
    double rows = 0;
    for (const UnitLoad* load : loads) rows += load->rows;
    if (rows <= 0) continue;
    std::vector<double> odds;  // of a group being among a row's
    std::map<NodeId, std::vector<double>> missed;
    for (size_t g = 0; g < loads.size(); ++g) {
      const double chosen = std::min(0.999, groups_per_row * loads[g]->rows / rows);
      odds.push_back(chosen / (1 - chosen));
      for (const Replica& replica : weights.at(loads[g]->unit)) {
        if (replica.weight > 0)
          missed.try_emplace(replica.server, loads.size(), 1.0).first->second[g] -= replica.weight;
      }
    }
    const double any = WaysToChoose(groups_per_row, odds, std::vector<double>(odds.size(), 1.0));
    for (const auto& [server, missing] : missed)
      reached += rows * (1 - WaysToChoose(groups_per_row, odds, missing) / any);
    all_rows += rows;
  }
  return all_rows > 0 ? reached / all_rows : 0;
}

std::vector<IntervalResult> Simulate(PlacementSnapshot pool_snapshot, LoadSource loads,
                                     const SimulateOptions& options) {
  Pool pool(std::move(pool_snapshot), options);
  PlacementSnapshot& snapshot = pool.snapshot();
  snapshot.units = loads.Next();
  std::vector<UnitLoad> first = snapshot.units, mean;
  for (UnitLoad& load : snapshot.units) load.rows = load.experts = 0;
  pool.Begin(PlanPlacement(snapshot, options.policy));
  Weights weights = PlanPlacement(snapshot, options.policy).weights;
  pool.Publish(weights);
  const Weights static_weights = weights;

  std::vector<IntervalResult> results;
  for (int i = 0; i < options.intervals; ++i) {
    IntervalResult& result = results.emplace_back();
    snapshot.units = i == 0 ? first : loads.Next();
    const StepTime step = PredictStep(snapshot, weights), fixed = PredictStep(snapshot, static_weights);
    result.step_s = step.max_s;
    result.balance = step.balance();
    result.static_step_s = fixed.max_s;
    result.static_balance = fixed.balance();
    result.fan_out = FanOut(snapshot, options.groups_per_row, weights);
    router::SmoothLoads(mean, snapshot.units, options.newest);
    snapshot.units = mean;
    const double now_s = (i + 1) * options.interval_s;
    pool.FinishLoads(now_s);
    const auto begin = std::chrono::steady_clock::now();
    const PlacementPlan plan = PlanPlacement(snapshot, options.policy);
    result.plan_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    for (const Move& move : plan.moves) ++(move.kind == Move::Kind::kLoad ? result.loads : result.drops);
    result.bytes_moved = static_cast<double>(result.loads) * snapshot.shape.unit_bytes;
    pool.Carry(plan.moves, now_s);
    weights = plan.weights;
    pool.Publish(weights);
  }
  return results;
}

IntervalResult Overall(const std::vector<IntervalResult>& intervals) {
  IntervalResult sum;
  double mean_s = 0, static_mean_s = 0;
  for (const IntervalResult& interval : intervals) {
    sum.step_s += interval.step_s;
    sum.static_step_s += interval.static_step_s;
    mean_s += interval.balance * interval.step_s;
    static_mean_s += interval.static_balance * interval.static_step_s;
    sum.fan_out += interval.fan_out / static_cast<double>(intervals.size());
    sum.loads += interval.loads;
    sum.drops += interval.drops;
    sum.bytes_moved += interval.bytes_moved;
    sum.plan_s = std::max(sum.plan_s, interval.plan_s);
  }
  sum.balance = sum.step_s > 0 ? mean_s / sum.step_s : 1;
  sum.static_balance = sum.static_step_s > 0 ? static_mean_s / sum.static_step_s : 1;
  return sum;
}

}  // namespace minke::cli
