// From where the units are to where they should be, a bounded number of moves at a time. Pure: a registry
// asks again with every new snapshot, so a move that was not carried out is simply asked for again.
#pragma once

#include <map>
#include <span>
#include <vector>

#include "services/router/placement/snapshot.h"

namespace minke::router {

// This round's moves, in order: loads on servers with room, then drops. `wanted`: the desired replicas that
// are missing, the urgent first. A load of a unit that nobody has loaded is never held back; the others keep
// to the options' bounds. A replica is dropped only when as many desired ones of its unit are loaded as the
// snapshot asks for, and never the last.
std::vector<Move> NextMoves(const PlacementSnapshot& snapshot,
                            const std::map<UnitId, std::vector<NodeId>>& desired,
                            std::span<const std::pair<UnitId, NodeId>> wanted,
                            const PlacementOptions& options);

// What each living server is to host once the moves are carried out.
std::map<NodeId, std::vector<UnitId>> AssignmentAfter(const PlacementSnapshot& snapshot,
                                                      std::span<const Move> moves);

}  // namespace minke::router
