// Looks for additional replicas that make the step faster by more than loading them costs. Pure.
#pragma once

#include <vector>

#include "services/router/placement/layout.h"
#include "services/router/placement/repair.h"

namespace minke::router {

// Adds replicas to the layout, greedily: always the one of all layers that helps most, onto a server with
// room or in place of an extra replica that is not needed. A layer keeps what was added up to where it paid
// best, and nothing if that is under options.layer_gain_min of its time. A unit "moves" by getting a replica
// where its rows go; the old one is then idle and gives way when somebody needs the room. Returns what was
// added, by layer, the layers that gain most first.
std::vector<Placed> AddUsefulReplicas(Layout& layout, const PlacementOptions& options);

}  // namespace minke::router
