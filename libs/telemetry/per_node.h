// Counters kept for each node of a set that changes. One thread, the owner, looks up, adds and drops entries;
// others read all of them. A look-up takes no lock: entries are added and dropped, rarely, under one.
#pragma once

#include <memory>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "libs/base/ids.h"
#include "libs/base/mutex.h"

namespace minke::telemetry {

// T: read by other threads while the owner writes, so of atomics.
template <typename T>
class PerNode {
 public:
  // Owner only. `make`: a unique_ptr<T>, for a node that has no entry yet.
  template <typename Make>
  T& Get(NodeId node, Make&& make) {
    const auto it = entries_.find(node);  // only the owner changes it
    if (it != entries_.end()) return *it->second;
    const MutexLock lock(mutex_);
    return *(entries_[node] = make());
  }
  // Owner only. Entries of nodes that are not `kept` are dropped: their number is bounded by the cluster's
  // members.
  void Retain(absl::FunctionRef<bool(NodeId)> kept) {
    const MutexLock lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end();) {
      const auto here = it++;
      if (!kept(here->first)) entries_.erase(here);
    }
  }
  // Any thread.
  void ForEach(absl::FunctionRef<void(NodeId, const T&)> visit) const {
    const MutexLock lock(mutex_);
    for (const auto& [node, entry] : entries_) visit(node, *entry);
  }

 private:
  mutable Mutex mutex_;
  absl::flat_hash_map<NodeId, std::unique_ptr<T>> entries_;  // changed under mutex_, by the owner
};

}  // namespace minke::telemetry
