#include "services/router/placement/even_out.h"

#include <algorithm>
#include <cstdlib>

namespace minke::router {
namespace {

constexpr double kAsFast = 1 + 1e-3;  // of a layer's time: below lies noise

class Evener {
 public:
  explicit Evener(Layout& layout) : layout_(layout), times_(layout.num_servers()) {}

  std::vector<Placed> Run() {
    int64_t over = 0, under = 0;
    for (int server = 0; server < layout_.num_servers(); ++server) {
      if (!layout_.Eligible(server)) continue;
      if (Over(server) > 0) LetGo(server, 0);
      (Over(server) > 0 ? over : under) += std::abs(Over(server));
    }
    // What others do as well without makes room there.
    for (int server = 0; server < layout_.num_servers() && under < over; ++server) {
      if (!layout_.Eligible(server) || Over(server) > 0) continue;
      const int64_t before = Over(server);
      LetGo(server, before - (over - under));
      under += before - Over(server);
    }
    std::vector<Placed> added;
    for (int server = 0; server < layout_.num_servers(); ++server) {
      if (layout_.Eligible(server) && Over(server) > 0) HandOn(server, added);
    }
    return added;
  }

 private:
  int64_t Over(int server) const { return std::ssize(layout_.UnitsOn(server)) - layout_.Room(server); }

  // Time of the unit's layer: with the unit also `to`, and not on `from` (-1: no such server).
  double LayerTime(int unit, int from, int to) {
    input_.clear();
    for (const int other : layout_.UnitsOf(layout_.LayerOf(unit))) {
      input_.push_back(layout_.SplitInput(other));
      if (other != unit) continue;
      std::vector<LayerShare>& replicas = input_.back().replicas;
      std::erase_if(replicas, [&](const LayerShare& share) { return share.server == from; });
      if (to >= 0) replicas.push_back({to});
    }
    return SplitLayer(input_, layout_.rates(), times_);
  }

  // Of extra replicas that are as good as idle, until the server is `over` its room.
  void LetGo(int server, int64_t over) {
    const std::vector<int> units(layout_.UnitsOn(server).begin(), layout_.UnitsOn(server).end());
    for (const int unit : units) {
      if (Over(server) <= over) return;
      if (!layout_.Extra(unit, server) || layout_.Changed(unit, server)) continue;
      if (LayerTime(unit, server, -1) > kAsFast * LayerTime(unit, -1, -1)) continue;
      layout_.Remove(unit, server);
    }
  }

  void HandOn(int server, std::vector<Placed>& added) {
    std::vector<int> targets;
    for (int other = 0; other < layout_.num_servers(); ++other) {
      if (layout_.Eligible(other) && Over(other) < 0) targets.push_back(other);
    }
    std::vector<int> units(layout_.UnitsOn(server).begin(), layout_.UnitsOn(server).end());
    std::stable_sort(units.begin(), units.end(),
                     [&](int a, int b) { return layout_.Load(a).rows < layout_.Load(b).rows; });
    for (const int unit : units) {
      if (Over(server) <= 0) return;
      if (layout_.Changed(unit, server)) continue;
      const double before = LayerTime(unit, -1, -1);
      for (const int target : targets) {
        if (Over(target) >= 0 || layout_.Hosts(target, unit) || layout_.Changed(unit, target) ||
            !layout_.KeepsHosts(unit, server, target) || LayerTime(unit, server, target) > kAsFast * before)
          continue;
        layout_.Remove(unit, server);
        layout_.Add(unit, target);
        added.push_back({unit, target});
        break;
      }
    }
  }

  Layout& layout_;
  std::vector<LayerUnit> input_;
  std::vector<double> times_;
};

}  // namespace

std::vector<Placed> EvenOut(Layout& layout) { return Evener(layout).Run(); }

}  // namespace minke::router
