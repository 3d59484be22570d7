#include "services/router/placement/moves.h"

#include <algorithm>
#include <set>

namespace minke::router {

std::vector<Move> NextMoves(const PlacementSnapshot& snapshot,
                            const std::map<UnitId, std::vector<NodeId>>& desired,
                            std::span<const std::pair<UnitId, NodeId>> wanted,
                            const PlacementOptions& options) {
  struct Room {
    int64_t slots = 0;
    int loading = 0;
  };
  std::map<NodeId, Room> room;
  std::map<UnitId, std::set<NodeId>> loaded;
  int loading = 0;
  for (const ServerSnapshot& server : snapshot.servers) {
    Room& here = room[server.id];
    here.slots = server.slots - static_cast<int64_t>(server.units.size());
    for (const HostedUnit& hosted : server.units) {
      if (hosted.loaded) {
        loaded[hosted.unit].insert(server.id);
      } else {
        ++here.loading, ++loading;
      }
    }
  }
  std::vector<Move> moves;
  std::set<UnitId> under_way;  // of those that nobody has loaded
  for (const ServerSnapshot& server : snapshot.servers) {
    for (const HostedUnit& hosted : server.units) {
      if (!hosted.loaded && !server.draining) under_way.insert(hosted.unit);
    }
  }
  for (const auto& [unit, server] : wanted) {
    Room& here = room[server];
    if (here.slots <= 0) continue;
    const bool urgent = !loaded.contains(unit) && !under_way.contains(unit);
    if (!urgent && (loading >= options.loads_max || here.loading >= options.loads_per_server_max)) continue;
    moves.push_back({Move::Kind::kLoad, unit, server});
    under_way.insert(unit);
    --here.slots, ++here.loading, ++loading;
  }
  int drops = 0;
  for (const ServerSnapshot& server : snapshot.servers) {
    for (const HostedUnit& hosted : server.units) {
      auto it = desired.find(hosted.unit);
      if (it == desired.end() || std::count(it->second.begin(), it->second.end(), server.id) > 0) continue;
      const auto is_loaded = [&](NodeId other) { return loaded[hosted.unit].contains(other); };
      const int64_t needed = std::min<int64_t>(std::max(1, snapshot.replicas), std::ssize(it->second));
      if (needed == 0 || std::count_if(it->second.begin(), it->second.end(), is_loaded) < needed) continue;
      if (drops++ < options.drops_max) moves.push_back({Move::Kind::kDrop, hosted.unit, server.id});
    }
  }
  return moves;
}

std::map<NodeId, std::vector<UnitId>> AssignmentAfter(const PlacementSnapshot& snapshot,
                                                      std::span<const Move> moves) {
  std::map<NodeId, std::set<UnitId>> hosted;
  for (const ServerSnapshot& server : snapshot.servers) {
    hosted[server.id];
    for (const HostedUnit& unit : server.units) hosted[server.id].insert(unit.unit);
  }
  for (const Move& move : moves) {
    if (move.kind == Move::Kind::kLoad) {
      hosted[move.server].insert(move.unit);
    } else {
      hosted[move.server].erase(move.unit);
    }
  }
  std::map<NodeId, std::vector<UnitId>> assignment;
  for (const auto& [server, units] : hosted) assignment[server] = {units.begin(), units.end()};
  return assignment;
}

}  // namespace minke::router
