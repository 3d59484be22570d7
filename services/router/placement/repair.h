// Gives every unit the replicas it lacks; moves nothing else. Pure.
#pragma once

#include <utility>
#include <vector>

#include "services/router/placement/layout.h"

namespace minke::router {

// One unit on one server, by index of the layout.
struct Placed {
  int unit = 0;
  int server = 0;
};

// Every unit gets the snapshot's replicas, on different servers and as many hosts, as far as there is room:
// first all units one, then all a second. A unit goes where its layer's time stays lowest, then where the
// step's does, then to the lowest id; a small server spreads its room over the layers. A full server gives up
// the least busy extra replica; where only servers that have the unit have room, another unit moves there.
// Returns what was added, in order of urgency.
std::vector<Placed> AddMissingReplicas(Layout& layout);

}  // namespace minke::router
