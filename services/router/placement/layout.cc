#include "services/router/placement/layout.h"

#include <algorithm>
#include <set>
#include <string>

#include "libs/base/status.h"

namespace minke::router {

Layout::Layout(const PlacementSnapshot& snapshot, const PlacementOptions& options)
    : snapshot_(snapshot), loads_(snapshot.units) {
  std::sort(loads_.begin(), loads_.end(),
            [](const UnitLoad& a, const UnitLoad& b) { return a.unit < b.unit; });
  for (size_t unit = 0; unit < loads_.size(); ++unit) {
    if (unit == 0 || loads_[unit].unit.layer != loads_[unit - 1].unit.layer) layers_.emplace_back();
    layers_.back().push_back(static_cast<int>(unit));
    layer_of_.push_back(static_cast<int>(layers_.size()) - 1);
    index_[loads_[unit].unit] = static_cast<int>(unit);
  }
  for (std::vector<int>& layer : layers_) {
    double sum = 0;
    for (const int unit : layer) sum += loads_[unit].rows;
    observed_.push_back(sum > 0);
    for (const int unit : layer) {
      if (sum <= 0) {
        loads_[unit].rows = 1, loads_[unit].experts = snapshot.shape.experts;
      } else if (loads_[unit].rows <= 0) {
        loads_[unit].rows = 1e-6 * sum, loads_[unit].experts = 0;
      }
    }
    std::stable_sort(layer.begin(), layer.end(),
                     [&](int a, int b) { return loads_[a].rows > loads_[b].rows; });
  }
  const double per_expert = options.split_rows_per_expert > 0
                                ? options.split_rows_per_expert
                                : RidgeRowsPerExpert(snapshot.shape, snapshot.servers);
  split_rows_ = per_expert * snapshot.shape.experts / snapshot.shape.experts_per_row;

  std::map<std::string, int> host_index;
  std::set<int> hosts;
  int next_host = 0;
  for (const ServerSnapshot& server : snapshot.servers) {
    rates_.push_back(RateOf(snapshot.shape, server));
    if (server.host.empty()) {
      host_.push_back(next_host++);
    } else {
      const auto [it, fresh] = host_index.try_emplace(server.host, next_host);
      next_host += fresh;
      host_.push_back(it->second);
    }
    if (server.draining) continue;
    ++eligible_;
    hosts.insert(host_.back());
  }
  eligible_hosts_ = static_cast<int>(hosts.size());
  replicas_.resize(loads_.size());
  units_on_.resize(rates_.size());
  hosts_.resize(loads_.size() * rates_.size());
  changed_.resize(hosts_.size());
  for (int server = 0; server < num_servers(); ++server) {
    if (!Eligible(server)) continue;
    for (const HostedUnit& hosted : snapshot.servers[server].units) {
      const int unit = IndexOf(hosted.unit);
      if (unit >= 0 && !Hosts(server, unit)) Add(unit, server);
    }
  }
  changed_.assign(hosts_.size(), false);
}

int Layout::IndexOf(UnitId unit) const {
  auto it = index_.find(unit);
  return it == index_.end() ? -1 : it->second;
}

bool Layout::Full(int server) const {
  return static_cast<int64_t>(units_on_[server].size()) >= Slots(server);
}

int Layout::HostsOf(int unit, int without_server) const {
  int count = 0;
  const std::vector<int>& list = replicas_[unit];
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i] == without_server) continue;
    bool seen = false;
    for (size_t j = 0; j < i && !seen; ++j)
      seen = list[j] != without_server && host_[list[j]] == host_[list[i]];
    count += !seen;
  }
  return count;
}

bool Layout::Wants(int unit, int replicas) const {
  const int have = static_cast<int>(replicas_[unit].size());
  return have < std::min(replicas, eligible_) || HostsOf(unit, -1) < std::min(replicas, eligible_hosts_);
}

bool Layout::CanSpread(int unit) const { return HostsOf(unit, -1) < eligible_hosts_; }

bool Layout::OnNewHost(int unit, int server) const {
  return std::none_of(replicas_[unit].begin(), replicas_[unit].end(),
                      [&](int other) { return host_[other] == host_[server]; });
}

bool Layout::KeepsHosts(int unit, int from, int to) const {
  const bool new_host = std::none_of(replicas_[unit].begin(), replicas_[unit].end(),
                                     [&](int other) { return other != from && host_[other] == host_[to]; });
  return HostsOf(unit, from) + (new_host ? 1 : 0) >= HostsOf(unit, -1);
}

bool Layout::Extra(int unit, int server) const {
  const int wanted = std::max(1, snapshot_.replicas);
  return static_cast<int>(replicas_[unit].size()) > wanted &&
         HostsOf(unit, server) >= std::min({wanted, eligible_hosts_, HostsOf(unit, -1)});
}

void Layout::Add(int unit, int server) {
  MK_CHECK(Eligible(server) && !Hosts(server, unit));
  hosts_[Cell(server, unit)] = changed_[Cell(server, unit)] = true;
  replicas_[unit].insert(std::upper_bound(replicas_[unit].begin(), replicas_[unit].end(), server), server);
  units_on_[server].push_back(unit);
}

void Layout::Remove(int unit, int server) {
  MK_CHECK(Hosts(server, unit));
  hosts_[Cell(server, unit)] = false;
  changed_[Cell(server, unit)] = true;
  std::erase(replicas_[unit], server);
  std::erase(units_on_[server], unit);
}

void Layout::Restore(int unit, int server) {
  Add(unit, server);
  changed_[Cell(server, unit)] = false;
}

LayerUnit Layout::SplitInput(int unit) const {
  const UnitLoad& load = loads_[unit];
  LayerUnit out{.rows = load.rows, .experts = ExpertsTouched(snapshot_.shape, load)};
  out.split = observed_[layer_of_[unit]] && load.rows >= split_rows_;
  for (const int server : replicas_[unit]) {
    out.replicas.push_back({server});
    out.split = out.split && rates_[server].row_s > 0;
  }
  return out;
}

double Layout::TimeAlone(int unit, int server) const {
  return ExpertsTouched(snapshot_.shape, loads_[unit]) * rates_[server].expert_read_s +
         loads_[unit].rows * rates_[server].row_s;
}

}  // namespace minke::router
