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
#include "libs/model/config.h"

namespace minke::router {

// Immutable; shared between threads as shared_ptr<const PlacementTable>.
class PlacementTable {
 public:
  using Replicas = std::vector<NodeId>;  // ascending
  PlacementTable() = default;
  PlacementTable(Epoch epoch, std::map<UnitId, Replicas> units) : epoch_(epoch), units_(std::move(units)) {}

  Epoch epoch() const { return epoch_; }
  const std::map<UnitId, Replicas>& units() const { return units_; }
  // Servers that host the unit now; empty if none does.
  std::span<const NodeId> Servers(UnitId unit) const;

  // The replica that serves a small load: all routers choose the same one, so that an expert's rows meet in
  // one launch (rendezvous hash of layer, group and server). Only servers for which `usable` holds; nullopt
  // if none.
  std::optional<NodeId> Choose(UnitId unit, absl::FunctionRef<bool(NodeId)> usable) const;

  // Units without a server.
  int64_t Missing() const;

 private:
  Epoch epoch_;
  std::map<UnitId, Replicas> units_;
};

// Every (layer, group) of the model.
std::vector<UnitId> AllUnits(const ModelConfig& config);

}  // namespace minke::router
