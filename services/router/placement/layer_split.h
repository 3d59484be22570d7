// How one layer's rows are shared out among its replicas, so that its slowest server is as fast as can be.
// Pure; used by the policy for every placement it considers, so it allocates nothing in its loops.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "services/router/placement/step_time.h"

namespace minke::router {

struct LayerShare {
  int32_t server = 0;  // index into the rates
  double rows = 0;     // out: its part of the unit's rows
};

struct LayerUnit {
  double rows = 0;
  double experts = 0;  // touched by all of them
  bool split = false;  // rows may go to several replicas; else all to one
  std::vector<LayerShare> replicas;
};

// Sets the shares, and times [rates]: of each server in this layer. Starts with every unit whole on one
// replica, then lets the units that may split flow to where servers are less busy, sweep by sweep, like
// water: a unit flows to a replica only while that lowers the time of the slowest of its own servers. A
// replica that takes part is charged for all the experts its unit touches, which is exact for many rows.
// Returns the time of the slowest server.
double SplitLayer(std::span<LayerUnit> units, std::span<const ServerRate> rates, std::span<double> times);

}  // namespace minke::router
