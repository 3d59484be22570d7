#include "services/router/placement/policy.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "libs/base/status.h"
#include "services/router/placement/even_out.h"
#include "services/router/placement/improve.h"
#include "services/router/placement/layout.h"
#include "services/router/placement/moves.h"
#include "services/router/placement/repair.h"
#include "services/router/placement/step_time.h"

namespace minke::router {
namespace {

using Weights = std::map<UnitId, std::vector<Replica>>;

// Splits the rows of every layer over `replicas` [unit][server index].
class Splitter {
 public:
  Splitter(const Layout& layout, const PlacementOptions& options)
      : layout_(layout), options_(options), times_(layout.num_servers()) {}

  // Published weights stay unless new ones are faster by options.weights_gain_min.
  Weights Split(const std::vector<std::vector<int>>& replicas,
                const std::map<std::pair<UnitId, NodeId>, double>* published) {
    Weights weights;
    for (int layer = 0; layer < layout_.num_layers(); ++layer) {
      std::vector<LayerUnit> fresh = Input(layer, replicas);
      SplitLayer(fresh, layout_.rates(), times_);
      if (published != nullptr) {
        std::vector<LayerUnit> old = Input(layer, replicas);
        if (Adopt(layer, old, *published) &&
            TimeOf(layer, fresh) >= (1 - options_.weights_gain_min) * TimeOf(layer, old)) {
          fresh = std::move(old);
        }
      }
      for (size_t i = 0; i < fresh.size(); ++i) {
        std::vector<Replica>& out = weights[layout_.Load(layout_.UnitsOf(layer)[i]).unit];
        for (const LayerShare& share : fresh[i].replicas)
          out.push_back({layout_.snapshot().servers[share.server].id, share.rows / fresh[i].rows});
        std::sort(out.begin(), out.end(),
                  [](const Replica& a, const Replica& b) { return a.server < b.server; });
      }
    }
    return weights;
  }

 private:
  std::vector<LayerUnit> Input(int layer, const std::vector<std::vector<int>>& replicas) const {
    std::vector<LayerUnit> input;
    for (const int unit : layout_.UnitsOf(layer)) {
      input.push_back(layout_.SplitInput(unit));
      input.back().replicas.clear();
      for (const int server : replicas[unit]) input.back().replicas.push_back({server});
    }
    return input;
  }
  // Sets the shares as published; false if those do not cover the rows.
  bool Adopt(int layer, std::vector<LayerUnit>& input,
             const std::map<std::pair<UnitId, NodeId>, double>& published) const {
    for (size_t i = 0; i < input.size(); ++i) {
      double sum = 0;
      for (LayerShare& share : input[i].replicas) {
        auto it = published.find(
            {layout_.Load(layout_.UnitsOf(layer)[i]).unit, layout_.snapshot().servers[share.server].id});
        const double weight = it == published.end() ? 0 : it->second;
        sum += weight;
        share.rows = weight * input[i].rows;
      }
      if (!input[i].replicas.empty() && std::abs(sum - 1) > 1e-3) return false;
    }
    return true;
  }
  double TimeOf(int layer, const std::vector<LayerUnit>& shares) {
    std::fill(times_.begin(), times_.end(), 0.0);
    for (size_t i = 0; i < shares.size(); ++i) {
      const UnitLoad& load = layout_.Load(layout_.UnitsOf(layer)[i]);
      for (const LayerShare& share : shares[i].replicas) {
        const ServerRate& rate = layout_.rates()[share.server];
        times_[share.server] +=
            ExpertsTouched(layout_.snapshot().shape, load, share.rows) * rate.expert_read_s +
            share.rows * rate.row_s;
      }
    }
    return *std::max_element(times_.begin(), times_.end());
  }

  const Layout& layout_;
  const PlacementOptions& options_;
  std::vector<double> times_;
};

// [unit][server index]: replicas that serve from now on; those of draining servers only where there is no
// other.
std::vector<std::vector<int>> Serving(const PlacementSnapshot& snapshot, const Layout& layout,
                                      std::span<const Move> moves) {
  std::set<std::pair<UnitId, NodeId>> dropped;
  for (const Move& move : moves) {
    if (move.kind == Move::Kind::kDrop) dropped.emplace(move.unit, move.server);
  }
  std::vector<std::vector<int>> staying(layout.num_units()), leaving(layout.num_units());
  for (int server = 0; server < layout.num_servers(); ++server) {
    for (const HostedUnit& hosted : snapshot.servers[server].units) {
      const int unit = layout.IndexOf(hosted.unit);
      if (unit < 0 || !hosted.loaded || dropped.contains({hosted.unit, snapshot.servers[server].id}))
        continue;
      (layout.Eligible(server) ? staying : leaving)[unit].push_back(server);
    }
  }
  for (size_t unit = 0; unit < staying.size(); ++unit) {
    if (staying[unit].empty()) staying[unit] = std::move(leaving[unit]);
  }
  return staying;
}

std::vector<Placed> Place(Layout& layout, const PlacementOptions& options) {
  std::vector<Placed> added = AddMissingReplicas(layout);
  bool observed = false;
  for (int layer = 0; layer < layout.num_layers(); ++layer) observed |= layout.Observed(layer);
  if (!observed || layout.num_eligible() == 0) return added;
  const std::vector<Placed> useful = AddUsefulReplicas(layout, options);
  added.insert(added.end(), useful.begin(), useful.end());
  const std::vector<Placed> evened = EvenOut(layout);
  added.insert(added.end(), evened.begin(), evened.end());
  return added;
}

}  // namespace

PlacementPlan PlanPlacement(const PlacementSnapshot& snapshot, const PlacementOptions& options) {
  Layout layout(snapshot, options);
  const std::vector<Placed> added = Place(layout, options);
  PlacementPlan plan;
  std::vector<std::vector<int>> desired(layout.num_units());
  for (int unit = 0; unit < layout.num_units(); ++unit) {
    std::vector<NodeId>& servers = plan.desired[layout.Load(unit).unit];
    for (const int server : layout.Replicas(unit)) {
      desired[unit].push_back(server);
      servers.push_back(snapshot.servers[server].id);
    }
    std::sort(servers.begin(), servers.end());
  }
  std::vector<std::pair<UnitId, NodeId>> wanted;
  for (const Placed& placed : added) {  // what a later step evicted again is not wanted
    if (layout.Hosts(placed.server, placed.unit))
      wanted.emplace_back(layout.Load(placed.unit).unit, snapshot.servers[placed.server].id);
  }
  plan.moves = NextMoves(snapshot, plan.desired, wanted, options);
  plan.loads_missing = std::ssize(wanted);
  std::map<std::pair<UnitId, NodeId>, double> published;
  for (const ServerSnapshot& server : snapshot.servers) {
    for (const HostedUnit& hosted : server.units) {
      plan.loads_missing += !hosted.loaded && !server.draining;
      if (hosted.loaded && hosted.weight > 0) published[{hosted.unit, server.id}] = hosted.weight;
    }
  }
  if (snapshot.servers.empty()) return plan;
  Splitter splitter(layout, options);
  plan.weights = splitter.Split(Serving(snapshot, layout, plan.moves), &published);
  plan.step_s = PredictStep(snapshot, plan.weights).max_s;
  plan.desired_step_s = PredictStep(snapshot, splitter.Split(desired, nullptr)).max_s;
  return plan;
}

void SmoothLoads(std::vector<UnitLoad>& mean, const std::vector<UnitLoad>& observed, double newest) {
  if (mean.empty()) {
    mean = observed;
    return;
  }
  MK_CHECK(mean.size() == observed.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    MK_CHECK(mean[i].unit == observed[i].unit);
    mean[i].rows += newest * (observed[i].rows - mean[i].rows);
    mean[i].experts += newest * (observed[i].experts - mean[i].experts);
  }
}

}  // namespace minke::router
