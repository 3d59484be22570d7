// What scaling and restarting the processes of a local cluster comes to: pure functions, without processes.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/cluster/operator.pb.h"

namespace minke::cli {

using cluster::v1::ChildState;
using cluster::v1::Role;

// As `minke scale` names it: "experts".
std::string_view PoolName(Role role);
// INVALID_ARGUMENT: nothing of that name can be scaled.
absl::StatusOr<Role> ParsePool(std::string_view name);

// Whether it is one of those that are to stay.
inline bool Stays(ChildState state) {
  return state == cluster::v1::CHILD_STATE_STARTING || state == cluster::v1::CHILD_STATE_RUNNING ||
         state == cluster::v1::CHILD_STATE_RESTARTING;
}

struct PoolLimits {
  bool etcd = false;  // several routers can share the cluster
  int replicas = 1;   // servers per (layer, group)
};

struct ScalePlan {
  int start = 0;
  std::vector<size_t> drain;  // indices of children, youngest first
};

// What makes `count` children of the role stay. `children`: oldest first. INVALID_ARGUMENT: one line that
// says what can be had instead.
absl::StatusOr<ScalePlan> PlanScale(std::span<const cluster::v1::Child> children, Role role, int64_t count,
                                    const PoolLimits& limits);

// Which child to ask to leave, as an index. NOT_FOUND: none that is to stay has that role and pid;
// INVALID_ARGUMENT: the others would be too few.
absl::StatusOr<size_t> PlanDrain(std::span<const cluster::v1::Child> children, Role role, int32_t pid,
                                 const PoolLimits& limits);

// How long to wait before the next start of a process that dies: twice as long each time, unless it lived for
// a while.
class RestartPause {
 public:
  static constexpr absl::Duration kFirst = absl::Milliseconds(200);
  static constexpr absl::Duration kLongest = absl::Seconds(5);
  static constexpr absl::Duration kLongLife = absl::Seconds(30);

  // `life`: from its last start to its end.
  absl::Duration Next(absl::Duration life);

 private:
  absl::Duration next_ = kFirst;
};

// Why a scaling is not done yet; empty: it is, as far as processes go. UNAVAILABLE: it will not be, because a
// process that it started has died for good.
absl::StatusOr<std::string> WhatIsLeft(const cluster::v1::ScaleAnswer& scaled,
                                       const cluster::v1::StatusAnswer& status);

// "expert 1 (pid 12), expert 2 (pid 13)"
std::string Names(std::span<const cluster::v1::Child* const> children);

}  // namespace minke::cli
