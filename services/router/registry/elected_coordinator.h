// One of several routers decides the placement. Each of them is a candidate: whoever creates etcd's leader
// key, under its own lease, decides until the key is gone, and writes the record only while the key is still
// its own and nobody else has written since.
#pragma once

#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "libs/registry/etcd_registry.h"

namespace minke::router {

// Thread-safe; has a thread.
class ElectedCoordinator {
 public:
  // The record that should follow `current` (empty: none yet). Called on the coordinator's thread.
  using DecideFunction = std::function<cluster::v1::PlacementRecord(
      const cluster::Members& members, const cluster::v1::PlacementRecord& current)>;

  // self: the router's id, as in its report. Borrows the registry.
  ElectedCoordinator(registry::EtcdRegistry& registry, NodeId self, DecideFunction decide,
                     absl::Duration period = absl::Milliseconds(250));
  ~ElectedCoordinator();

  bool leading() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace minke::router
