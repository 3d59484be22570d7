// What the coordinator of a cluster decides: which expert server hosts what, and which of the loaded replicas
// are published. A pure function of what is known, so that any router can go on from where another one
// stopped: the router's own memory (static registry) or etcd keeps the record between calls. No I/O, clock or
// lock.
#pragma once

#include <cstdint>
#include <vector>

#include "libs/base/ids.h"
#include "libs/cluster/make_view.h"
#include "libs/model/config.h"
#include "proto/cluster/cluster.pb.h"
#include "services/router/placement/snapshot.h"

namespace minke::router {

struct CoordinatorOptions {
  std::vector<UnitId> units;  // AllUnits of the model; empty: nothing is to be placed
  UnitShape shape;            // of each
  int replicas = 1;           // of every unit, at least
  // More replicas than that, where loads ask for them, on servers that do not say how many units they have
  // room for; those that do use all their room.
  int spare_slots = 0;
  int expert_servers = 1;   // to wait for before the first placement
  uint32_t fresh_term = 1;  // term of a record that begins from nothing
  int64_t settled_ms = 0;   // until then members may be on their way back: nothing they had is given away
};

// The record that should follow `current`; equal to it if nothing is to change. `now_ms` is only compared
// with settled_ms. A unit that moves is loaded by its new server, published with both, then without the old
// one, which may let go of it only after that. Servers that drain are given nothing and keep what nobody else
// has loaded yet.
cluster::v1::PlacementRecord Decide(const CoordinatorOptions& options, const cluster::Members& members,
                                    const cluster::v1::PlacementRecord& current, int64_t now_ms);

}  // namespace minke::router
