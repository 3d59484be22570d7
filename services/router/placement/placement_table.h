// Which expert servers host which (layer, group): an immutable snapshot with its epoch. No I/O, clock or
// lock. What the next one should be is policy.h's business.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "libs/base/ids.h"
#include "libs/cluster/replica_set.h"
#include "libs/model/config.h"

namespace minke::router {

// Immutable; shared between threads as shared_ptr<const PlacementTable>.
class PlacementTable {
 public:
  using Replicas = cluster::ReplicaSet;
  PlacementTable() = default;
  PlacementTable(Epoch epoch, std::map<UnitId, Replicas> units) : epoch_(epoch), units_(std::move(units)) {}

  Epoch epoch() const { return epoch_; }
  const std::map<UnitId, Replicas>& units() const { return units_; }
  // Servers that host the unit now; empty if none does.
  std::span<const NodeId> Servers(UnitId unit) const;

  // Whether the unit's rows go to several servers.
  bool Split(UnitId unit) const;
  // The server for a row of the unit, by the weights; `draw` [0, 1) tells rows apart. Where there are none,
  // or the one drawn is not usable, all routers choose the same (rendezvous hash of layer, group and server),
  // so that an expert's rows meet in one launch. Only servers for which `usable` holds; nullopt if none.
  std::optional<NodeId> Choose(UnitId unit, float draw, absl::FunctionRef<bool(NodeId)> usable) const;

  // Whether there are units, and each has a server that is `usable`.
  bool Served(absl::FunctionRef<bool(NodeId)> usable) const;

 private:
  Epoch epoch_;
  std::map<UnitId, Replicas> units_;
};

// Every (layer, group) of the model.
std::vector<UnitId> AllUnits(const ModelConfig& config);

}  // namespace minke::router
