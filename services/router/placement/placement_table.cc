#include "services/router/placement/placement_table.h"

#include <algorithm>

namespace minke::router {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

uint64_t Rank(UnitId unit, NodeId server) {
  return Mix(server.value ^ Mix(uint64_t{unit.layer} << 32 | unit.group));
}

}  // namespace

std::span<const NodeId> PlacementTable::Servers(UnitId unit) const {
  auto it = units_.find(unit);
  return it == units_.end() ? std::span<const NodeId>() : std::span<const NodeId>(it->second.servers);
}

bool PlacementTable::Split(UnitId unit) const {
  const auto it = units_.find(unit);
  return it != units_.end() && std::count_if(it->second.weights.begin(), it->second.weights.end(),
                                             [](float weight) { return weight > 0; }) > 1;
}

std::optional<NodeId> PlacementTable::Choose(UnitId unit, float draw,
                                             absl::FunctionRef<bool(NodeId)> usable) const {
  const auto it = units_.find(unit);
  if (it == units_.end()) return std::nullopt;
  const Replicas& replicas = it->second;
  for (size_t i = 0; i < replicas.weights.size(); ++i) {
    draw -= replicas.weights[i];
    if (draw >= 0) continue;
    if (usable(replicas.servers[i])) return replicas.servers[i];
    break;
  }
  std::optional<NodeId> best;
  for (const NodeId server : replicas.servers) {
    if (usable(server) && (!best || Rank(unit, server) > Rank(unit, *best))) best = server;
  }
  return best;
}

bool PlacementTable::Served(absl::FunctionRef<bool(NodeId)> usable) const {
  return !units_.empty() && std::all_of(units_.begin(), units_.end(), [&](const auto& unit) {
    return std::any_of(unit.second.servers.begin(), unit.second.servers.end(), usable);
  });
}

std::vector<UnitId> AllUnits(const ModelConfig& config) {
  std::vector<UnitId> units;
  for (const int32_t layer : config.MoeLayers()) {
    for (int32_t group = 0; group < config.placement_groups(); ++group) {
      units.push_back({static_cast<uint32_t>(layer), static_cast<uint32_t>(group)});
    }
  }
  return units;
}

}  // namespace minke::router
