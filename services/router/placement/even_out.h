// Brings servers that hold more than they should back to their room, without making any layer slower. Pure.
#pragma once

#include <vector>

#include "services/router/placement/layout.h"
#include "services/router/placement/repair.h"

namespace minke::router {

// A server over its room (ServerSnapshot::room), because something moved to it or others have joined, lets go
// of extra replicas that its layers do as well without; then it hands units on to servers under theirs, where
// these are as fast for their layers. Returns what was added.
std::vector<Placed> EvenOut(Layout& layout);

}  // namespace minke::router
