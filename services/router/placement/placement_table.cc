#include "services/router/placement/placement_table.h"

#include <algorithm>
#include <set>

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
  return it == units_.end() ? std::span<const NodeId>() : std::span<const NodeId>(it->second);
}

std::optional<NodeId> PlacementTable::Choose(UnitId unit, absl::FunctionRef<bool(NodeId)> usable) const {
  std::optional<NodeId> best;
  for (const NodeId server : Servers(unit)) {
    if (usable(server) && (!best || Rank(unit, server) > Rank(unit, *best))) best = server;
  }
  return best;
}

bool PlacementTable::Served(absl::FunctionRef<bool(NodeId)> usable) const {
  return !units_.empty() && std::all_of(units_.begin(), units_.end(), [&](const auto& unit) {
    return std::any_of(unit.second.begin(), unit.second.end(), usable);
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

std::map<NodeId, std::vector<UnitId>> PlanAssignment(std::span<const UnitId> units,
                                                     std::span<const NodeId> servers, int replicas,
                                                     const std::map<NodeId, std::vector<UnitId>>& previous) {
  std::map<NodeId, std::set<UnitId>> hosted;
  for (const NodeId server : servers) hosted[server];
  const std::set<UnitId> known(units.begin(), units.end());
  std::map<UnitId, int> copies;
  for (const auto& [server, list] : previous) {
    auto it = hosted.find(server);
    if (it == hosted.end()) continue;
    for (const UnitId unit : list) {
      if (known.contains(unit) && copies[unit] < replicas && it->second.insert(unit).second) ++copies[unit];
    }
  }
  const int wanted = std::min<int>(replicas, static_cast<int>(servers.size()));
  for (const UnitId unit : units) {
    while (copies[unit] < wanted) {
      std::set<UnitId>* least = nullptr;
      for (auto& [server, list] : hosted) {
        if (!list.contains(unit) && (least == nullptr || list.size() < least->size())) least = &list;
      }
      least->insert(unit);
      ++copies[unit];
    }
  }
  std::map<NodeId, std::vector<UnitId>> assignment;
  for (const auto& [server, list] : hosted) assignment[server] = {list.begin(), list.end()};
  return assignment;
}

}  // namespace minke::router
