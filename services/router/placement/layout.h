// A placement that the policy is thinking about: the snapshot's units and servers by index, and which server
// is to host what. Draining servers host nothing in it.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "services/router/placement/layer_split.h"
#include "services/router/placement/snapshot.h"

namespace minke::router {

class Layout {
 public:
  // Borrows the snapshot. Replicas still loading count like loaded ones: where they are going is decided.
  Layout(const PlacementSnapshot& snapshot, const PlacementOptions& options);

  int num_units() const { return static_cast<int>(loads_.size()); }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  int num_servers() const { return static_cast<int>(rates_.size()); }
  int num_eligible() const { return eligible_; }
  // Units of a layer, the heavy ones first.
  std::span<const int> UnitsOf(int layer) const { return layers_[layer]; }
  int LayerOf(int unit) const { return layer_of_[unit]; }
  // Its load, never 0: a layer without observations counts as if all its experts were read by one row.
  const UnitLoad& Load(int unit) const { return loads_[unit]; }
  bool Observed(int layer) const { return observed_[layer]; }
  bool Eligible(int server) const { return !snapshot_.servers[server].draining; }
  std::span<const ServerRate> rates() const { return rates_; }
  const PlacementSnapshot& snapshot() const { return snapshot_; }
  int IndexOf(UnitId unit) const;  // -1: not of this model

  std::span<const int> Replicas(int unit) const { return replicas_[unit]; }
  std::span<const int> UnitsOn(int server) const { return units_on_[server]; }
  bool Hosts(int server, int unit) const { return hosts_[Cell(server, unit)]; }
  bool Full(int server) const;
  int64_t Slots(int server) const { return snapshot_.servers[server].slots; }
  int64_t Room(int server) const { return snapshot_.servers[server].room; }
  // Servers and hosts that a unit still needs, for `replicas` of it.
  bool Wants(int unit, int replicas) const;
  // Whether some host has no replica of the unit yet.
  bool CanSpread(int unit) const;
  bool OnNewHost(int unit, int server) const;
  // Whether the unit is on as many hosts as now when it goes from one server to another.
  bool KeepsHosts(int unit, int from, int to) const;
  // An extra replica, whose loss leaves as many replicas on as many hosts as are asked for.
  bool Extra(int unit, int server) const;
  // Whether this plan added or removed it.
  bool Changed(int unit, int server) const { return changed_[Cell(server, unit)]; }

  void Add(int unit, int server);
  void Remove(int unit, int server);
  // Undoes a Remove of what was there before this plan.
  void Restore(int unit, int server);

  // Input of SplitLayer.
  LayerUnit SplitInput(int unit) const;
  double TimeAlone(int unit, int server) const;

 private:
  size_t Cell(int server, int unit) const { return static_cast<size_t>(server) * loads_.size() + unit; }
  int HostsOf(int unit, int without_server) const;

  const PlacementSnapshot& snapshot_;
  double split_rows_;  // of a unit, from which it may be split
  std::vector<UnitLoad> loads_;
  std::vector<std::vector<int>> layers_;
  std::vector<int> layer_of_;
  std::vector<bool> observed_;
  std::map<UnitId, int> index_;
  std::vector<ServerRate> rates_;
  std::vector<int> host_;
  int eligible_ = 0, eligible_hosts_ = 0;
  std::vector<std::vector<int>> replicas_, units_on_;
  std::vector<bool> hosts_, changed_;
};

}  // namespace minke::router
