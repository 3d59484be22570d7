#include "services/router/placement/improve.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <queue>

namespace minke::router {
namespace {

constexpr int kTargets = 3;            // least busy servers tried for a unit
constexpr size_t kStepsPerUnit = 2;    // of a layer's units, in one plan: more would not be carried out soon
constexpr double kStepGainMin = 2e-4;  // of a layer's time: smaller steps are not taken
constexpr double kEnough = 0.999;      // of the best net gain: fewer loads for as good as the same

// A replica to add, and the one that makes room for it (-1: none).
struct Step {
  int unit = 0, server = 0, evicted = -1;
};

// How busy a layer's servers are, by a norm close to the maximum that still sees the second busiest: with two
// equally slow servers a step that relieves one of them counts.
double Norm(std::span<const double> times, double max) {
  if (max <= 0) return 0;
  double sum = 0;
  for (const double time : times) {
    const double t2 = (time / max) * (time / max), t4 = t2 * t2;
    sum += t4 * t4;
  }
  return max * std::pow(sum, 1.0 / 8);
}

class Improver {
 public:
  Improver(Layout& layout, const PlacementOptions& options)
      : layout_(layout),
        options_(options),
        times_(layout.num_servers()),
        share_(layout.num_units()),
        layers_(layout.num_layers()) {}

  std::vector<Placed> Run() {
    for (int layer = 0; layer < layout_.num_layers(); ++layer) {
      Solve(layer, nullptr);
      KeepShares();
      layers_[layer].norm = Norm(times_, max_);
      layers_[layer].max_s = {max_};
      step_s_ += max_;
    }
    std::priority_queue<Candidate> heap;
    const auto push = [&](int layer) {
      const size_t steps_max = kStepsPerUnit * layout_.UnitsOf(layer).size();
      if (!layout_.Observed(layer) || layers_[layer].steps.size() >= steps_max) return;
      if (std::optional<Candidate> next = Best(layer)) heap.push(*next);
    };
    for (int layer = 0; layer < layout_.num_layers(); ++layer) push(layer);
    while (!heap.empty()) {
      const Candidate next = heap.top();
      heap.pop();
      if (Possible(next.step)) Take(next);
      push(next.layer);
    }
    return KeepWhatPays();
  }

 private:
  struct Candidate {
    double gain = 0;
    int layer = 0;
    Step step;
    bool operator<(const Candidate& other) const {
      return gain != other.gain ? gain < other.gain : layer > other.layer;
    }
  };
  struct Layer {
    double norm = 0;
    std::vector<double> max_s;  // before any step, after the first, ...
    std::vector<Step> steps;
  };

  // Splits the layer's rows as placed, with `step` taken if given: fills input_, times_ and max_.
  void Solve(int layer, const Step* step) {
    const std::span<const int> units = layout_.UnitsOf(layer);
    input_.clear();
    for (const int unit : units) {
      input_.push_back(layout_.SplitInput(unit));
      std::vector<LayerShare>& replicas = input_.back().replicas;
      if (step == nullptr) continue;
      if (unit == step->unit) replicas.push_back({step->server});
      if (unit == step->evicted)
        std::erase_if(replicas, [&](const LayerShare& share) { return share.server == step->server; });
    }
    max_ = SplitLayer(input_, layout_.rates(), times_);
    solved_ = layer;
  }
  void KeepShares() {
    for (size_t i = 0; i < input_.size(); ++i) share_[layout_.UnitsOf(solved_)[i]] = input_[i].replicas;
  }
  double ShareOf(int unit, int server) const {
    for (const LayerShare& share : share_[unit]) {
      if (share.server == server) return share.rows;
    }
    return 0;
  }

  // Replicas that were there before this plan and may go.
  bool MayEvict(int unit, int server) const {
    return layout_.Hosts(server, unit) && layout_.Extra(unit, server) && !layout_.Changed(unit, server);
  }
  bool Possible(const Step& step) const {
    if (layout_.Hosts(step.server, step.unit)) return false;
    return step.evicted < 0 ? !layout_.Full(step.server) : MayEvict(step.evicted, step.server);
  }
  // What may make room for `unit` on a full server: an idle replica of any layer, else a busy one of the
  // same.
  std::optional<int> Evictable(int unit, int server) const {
    std::optional<int> busy;
    for (const int other : layout_.UnitsOn(server)) {
      if (!MayEvict(other, server)) continue;
      if (ShareOf(other, server) <= 0) return other;
      if (layout_.LayerOf(other) == layout_.LayerOf(unit)) busy = other;
    }
    return busy;
  }

  // The step that helps the layer most, from its slowest server to one of the fastest.
  std::optional<Candidate> Best(int layer) {
    Solve(layer, nullptr);
    const std::vector<double> times = times_;
    const int slowest = static_cast<int>(std::max_element(times.begin(), times.end()) - times.begin());
    std::optional<Candidate> best;
    for (const int unit : layout_.UnitsOf(layer)) {
      if (ShareOf(unit, slowest) <= 0) continue;
      for (const Step& step : StepsFor(unit, times)) {
        Solve(layer, &step);
        const double gain = layers_[layer].norm - Norm(times_, max_);
        if (gain < kStepGainMin * layers_[layer].norm) continue;
        if (!best || gain > best->gain) best = Candidate{gain, layer, step};
      }
    }
    return best;
  }

  std::vector<Step> StepsFor(int unit, const std::vector<double>& times) const {
    std::array<Step, kTargets> found;
    std::array<double, kTargets> found_time;
    int count = 0;
    const bool spread = layout_.CanSpread(unit);
    for (int server = 0; server < layout_.num_servers(); ++server) {
      // What this plan took from a server does not come back to it: undoing a step stays simple.
      if (!layout_.Eligible(server) || layout_.Hosts(server, unit) || layout_.Changed(unit, server)) continue;
      if (spread && !layout_.OnNewHost(unit, server)) continue;
      const double time = times[server] + layout_.TimeAlone(unit, server);
      if (count == kTargets && time >= found_time[count - 1]) continue;
      std::optional<int> evicted;
      if (layout_.Full(server) && !(evicted = Evictable(unit, server))) continue;
      int at = count < kTargets ? count++ : count - 1;
      for (; at > 0 && found_time[at - 1] > time; --at)
        found[at] = found[at - 1], found_time[at] = found_time[at - 1];
      found[at] = {unit, server, evicted.value_or(-1)};
      found_time[at] = time;
    }
    return {found.begin(), found.begin() + count};
  }

  void Take(const Candidate& next) {
    if (next.step.evicted >= 0) layout_.Remove(next.step.evicted, next.step.server);
    layout_.Add(next.step.unit, next.step.server);
    Solve(next.layer, nullptr);
    KeepShares();
    Layer& layer = layers_[next.layer];
    layer.norm = Norm(times_, max_);
    layer.max_s.push_back(max_);
    layer.steps.push_back(next.step);
  }

  // Shares of the step's time, over the horizon, in seconds.
  double NetGain(const Layer& layer, size_t steps) const {
    const double load_s =
        layout_.snapshot().shape.unit_bytes / options_.load_bytes_per_s * options_.load_slowdown;
    return (layer.max_s[0] - layer.max_s[steps]) / step_s_ * options_.horizon_s -
           static_cast<double>(steps) * load_s;
  }

  std::vector<Placed> KeepWhatPays() {
    std::vector<std::pair<double, int>> order;  // net gain, layer
    for (int index = 0; index < layout_.num_layers(); ++index) {
      Layer& layer = layers_[index];
      double best = 0;
      for (size_t n = 1; n <= layer.steps.size(); ++n) best = std::max(best, NetGain(layer, n));
      size_t keep = 0;
      while (best > 0 && keep < layer.steps.size() && NetGain(layer, keep) < kEnough * best) ++keep;
      if (layer.max_s[0] - layer.max_s[keep] < options_.layer_gain_min * layer.max_s[0]) keep = 0;
      for (; layer.steps.size() > keep; layer.steps.pop_back()) {
        const Step& step = layer.steps.back();
        layout_.Remove(step.unit, step.server);
        if (step.evicted >= 0) layout_.Restore(step.evicted, step.server);
      }
      if (keep > 0) order.emplace_back(NetGain(layer, keep), index);
    }
    std::stable_sort(order.begin(), order.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<Placed> added;
    for (const auto& [gain, index] : order) {
      for (const Step& step : layers_[index].steps) added.push_back({step.unit, step.server});
    }
    return added;
  }

  Layout& layout_;
  const PlacementOptions& options_;
  std::vector<LayerUnit> input_;
  std::vector<double> times_;
  double max_ = 0, step_s_ = 0;
  int solved_ = 0;
  std::vector<std::vector<LayerShare>> share_;  // [unit], as solved last
  std::vector<Layer> layers_;
};

}  // namespace

std::vector<Placed> AddUsefulReplicas(Layout& layout, const PlacementOptions& options) {
  return Improver(layout, options).Run();
}

}  // namespace minke::router
