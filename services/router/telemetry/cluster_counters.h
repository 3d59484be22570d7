// What a router knows of the cluster, as metrics: members, the placement's epoch, replicas and their moves.
// Every router of a cluster shows the same. Thread-safe.
#pragma once

#include <cstdint>
#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "libs/base/ids.h"
#include "libs/base/mutex.h"
#include "libs/telemetry/page.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::router {

class ClusterCounters {
 public:
  void OnView(const cluster::v1::ClusterView& view);
  void Collect(telemetry::Page& page) const;

 private:
  mutable Mutex mutex_;
  cluster::v1::ClusterView view_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<UnitId, NodeId>> replicas_ ABSL_GUARDED_BY(mutex_);  // published
  uint64_t added_ ABSL_GUARDED_BY(mutex_) = 0, dropped_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace minke::router
