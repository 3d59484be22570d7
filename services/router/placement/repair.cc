#include "services/router/placement/repair.h"

#include <algorithm>
#include <tuple>

namespace minke::router {
namespace {

// The extra replica on the server that serves the fewest rows; -1: none.
int LeastBusyExtra(const Layout& layout, int server) {
  int best = -1;
  double best_rows = 0;
  for (const int unit : layout.UnitsOn(server)) {
    if (!layout.Extra(unit, server) || layout.Changed(unit, server)) continue;
    const double rows = layout.Load(unit).rows / static_cast<double>(layout.Replicas(unit).size());
    if (best < 0 || rows < best_rows) best = unit, best_rows = rows;
  }
  return best;
}

class Repair {
 public:
  explicit Repair(Layout& layout)
      : layout_(layout),
        layer_s_(layout.num_layers(), std::vector<double>(layout.num_servers())),
        step_s_(layout.num_servers()),
        wanted_(std::max(1, layout.snapshot().replicas)) {
    for (int server = 0; server < layout.num_servers(); ++server) {
      for (const int unit : layout.UnitsOn(server)) Count(unit, server, 1);
    }
  }

  std::vector<Placed> Run() {
    for (int replicas = 1; replicas <= wanted_; ++replicas) {
      for (int layer = 0; layer < layout_.num_layers(); ++layer) {
        for (const int unit : layout_.UnitsOf(layer)) {
          while (layout_.Wants(unit, replicas) && AddOne(unit, replicas)) {
          }
        }
      }
    }
    return std::move(added_);
  }

 private:
  void Count(int unit, int server, double sign) {
    const double time = sign * layout_.TimeAlone(unit, server) / wanted_;
    layer_s_[layout_.LayerOf(unit)][server] += time;
    step_s_[server] += time;
  }

  bool AddOne(int unit, int replicas) {
    const int layer = layout_.LayerOf(unit);
    const bool enough = static_cast<int>(layout_.Replicas(unit).size()) >=
                        std::min(replicas, layout_.num_eligible());  // another host is all it lacks
    int best = -1;
    std::tuple<bool, bool, bool, double, double, NodeId> best_key;
    for (int server = 0; server < layout_.num_servers(); ++server) {
      if (!layout_.Eligible(server) || layout_.Hosts(server, unit)) continue;
      const bool same_host = layout_.CanSpread(unit) && !layout_.OnNewHost(unit, server);
      if (enough && same_host) continue;
      if (layout_.Full(server) && LeastBusyExtra(layout_, server) < 0) continue;
      const int64_t units = std::ssize(layout_.UnitsOn(server));
      const int64_t room = std::min(layout_.Room(server), layout_.Slots(server));
      const bool over = units >= room;  // its last slots are for moving
      const bool early = units * layout_.num_layers() >= room * (layer + 1);
      const double time = layout_.TimeAlone(unit, server) / wanted_;
      // Sums of the same numbers in another order are equal.
      const auto rounded = [](double s) { return static_cast<double>(static_cast<float>(s)); };
      const std::tuple key(same_host, over, early, rounded(layer_s_[layer][server] + time),
                           rounded(step_s_[server] + time), layout_.snapshot().servers[server].id);
      if (best < 0 || key < best_key) best = server, best_key = key;
    }
    if (best < 0) return !enough && AddBySwap(unit);
    if (layout_.Full(best)) {
      const int evicted = LeastBusyExtra(layout_, best);
      Count(evicted, best, -1);
      layout_.Remove(evicted, best);
    }
    Put(unit, best);
    return true;
  }

  void Put(int unit, int server) {
    layout_.Add(unit, server);
    Count(unit, server, 1);
    added_.push_back({unit, server});
  }

  // Every server with room has the unit already: some other unit makes room on a full one by going there.
  bool AddBySwap(int unit) {
    for (const bool hosted_before : {false, true}) {  // rather one that this plan put there
      for (int room = 0; room < layout_.num_servers(); ++room) {
        if (!layout_.Eligible(room) || layout_.Full(room)) continue;
        for (int full = 0; full < layout_.num_servers(); ++full) {
          if (!layout_.Eligible(full) || layout_.Hosts(full, unit)) continue;
          for (const int other : layout_.UnitsOn(full)) {
            if (layout_.Hosts(room, other) || layout_.Changed(other, full) == hosted_before) continue;
            layout_.Remove(other, full);
            Count(other, full, -1);
            Put(other, room);
            Put(unit, full);
            return true;
          }
        }
      }
    }
    return false;
  }

  Layout& layout_;
  std::vector<std::vector<double>> layer_s_;  // [layer][server]
  std::vector<double> step_s_;                // [server]
  const int wanted_;
  std::vector<Placed> added_;
};

}  // namespace

std::vector<Placed> AddMissingReplicas(Layout& layout) { return Repair(layout).Run(); }

}  // namespace minke::router
