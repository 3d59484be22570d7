// Where units should be, what to move next, and how rows are split over replicas: a pure function of a
// snapshot, for 1 to 320 servers. docs/placement.md says why it decides as it does.
#pragma once

#include <vector>

#include "services/router/placement/snapshot.h"

namespace minke::router {

// The whole policy. Deterministic; takes milliseconds, so that a timer thread may call it. REQUIRES: server
// ids differ, units differ.
PlacementPlan PlanPlacement(const PlacementSnapshot& snapshot, const PlacementOptions& options);

// Observed loads change slowly: `observed` takes the part `newest` (0 to 1) of the mean. Both hold the same
// units in the same order; an empty mean begins with the observation.
void SmoothLoads(std::vector<UnitLoad>& mean, const std::vector<UnitLoad>& observed, double newest);

}  // namespace minke::router
