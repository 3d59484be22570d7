#include "cli/pool.h"

#include <algorithm>

#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli {
namespace {

struct Pool {
  Role role;
  std::string_view name;
  int64_t count_max;  // as the flags of `minke up`
};

constexpr Pool kPools[] = {{cluster::v1::ROLE_EXPERT, "experts", 256},
                           {cluster::v1::ROLE_ATTENTION, "attention", 256},
                           {cluster::v1::ROLE_ROUTER, "routers", 64},
                           {cluster::v1::ROLE_GATEWAY, "gateway", 1}};

const Pool* Find(Role role) {
  const auto* found = std::find_if(std::begin(kPools), std::end(kPools),
                                   [role](const Pool& pool) { return pool.role == role; });
  return found == std::end(kPools) ? nullptr : found;
}

absl::Status GatewayIsNotScalable() {
  return absl::InvalidArgumentError(
      "gateway: cannot be scaled: expected experts, attention or routers; one process listens on the HTTP "
      "port");
}

absl::Status CheckCount(const Pool& pool, int64_t count, const PoolLimits& limits) {
  const auto refuse = [&](const auto&... expected) {
    return absl::InvalidArgumentError(StrCat(pool.name, ": expected ", expected..., ", found ", count));
  };
  if (count < 1) return refuse("at least 1");
  if (pool.role == cluster::v1::ROLE_ROUTER && count > 1 && !limits.etcd) {
    return refuse("1 with --registry=static (several routers need minke up --registry=etcd)");
  }
  if (pool.role == cluster::v1::ROLE_EXPERT && count < limits.replicas) {
    return refuse("at least the cluster's --replicas (", limits.replicas, ")");
  }
  if (count > pool.count_max) return refuse("at most ", pool.count_max);
  return absl::OkStatus();
}

}  // namespace

std::string_view PoolName(Role role) {
  const Pool* pool = Find(role);
  return pool == nullptr ? "etcd" : pool->name;
}

absl::StatusOr<Role> ParsePool(std::string_view name) {
  for (const Pool& pool : kPools) {
    if (pool.name != name) continue;
    if (pool.role == cluster::v1::ROLE_GATEWAY) return GatewayIsNotScalable();
    return pool.role;
  }
  return absl::InvalidArgumentError(StrCat("expected experts, attention or routers, found '", name, "'"));
}

absl::StatusOr<ScalePlan> PlanScale(std::span<const cluster::v1::Child> children, Role role, int64_t count,
                                    const PoolLimits& limits) {
  const Pool* pool = Find(role);
  if (pool == nullptr) return absl::InvalidArgumentError("role: expected one that can be scaled, found none");
  if (role == cluster::v1::ROLE_GATEWAY) return GatewayIsNotScalable();
  MK_RETURN_IF_ERROR(CheckCount(*pool, count, limits));
  std::vector<size_t> staying;
  for (size_t i = 0; i < children.size(); ++i) {
    if (children[i].role() == role && Stays(children[i].state())) staying.push_back(i);
  }
  ScalePlan plan;
  plan.start = static_cast<int>(std::max<int64_t>(0, count - std::ssize(staying)));
  for (; std::ssize(staying) > count; staying.pop_back()) plan.drain.push_back(staying.back());
  return plan;
}

absl::StatusOr<size_t> PlanDrain(std::span<const cluster::v1::Child> children, Role role, int32_t pid,
                                 const PoolLimits& limits) {
  const auto child = std::find_if(children.begin(), children.end(), [&](const cluster::v1::Child& candidate) {
    return candidate.role() == role && candidate.pid() == pid && Stays(candidate.state());
  });
  const Pool* pool = Find(role);
  if (pool == nullptr || child == children.end()) {
    return absl::NotFoundError(StrCat(PoolName(role), ": no process of this minke up has pid ", pid));
  }
  if (role == cluster::v1::ROLE_GATEWAY) {
    return absl::InvalidArgumentError("gateway: cannot be drained: nobody else listens on the HTTP port");
  }
  const auto staying =
      std::count_if(children.begin(), children.end(), [role](const cluster::v1::Child& candidate) {
        return candidate.role() == role && Stays(candidate.state());
      });
  MK_RETURN_IF_ERROR(CheckCount(*pool, staying - 1, limits));
  return static_cast<size_t>(child - children.begin());
}

absl::Duration RestartPause::Next(absl::Duration life) {
  if (life >= kLongLife) next_ = kFirst;
  const absl::Duration pause = next_;
  next_ = std::min(2 * pause, kLongest);
  return pause;
}

std::string Names(std::span<const cluster::v1::Child* const> children) {
  std::string names;
  for (const cluster::v1::Child* child : children)
    StrAppend(&names, names.empty() ? "" : ", ", child->name(), " (pid ", child->pid(), ")");
  return names;
}

absl::StatusOr<std::string> WhatIsLeft(const cluster::v1::ScaleAnswer& scaled,
                                       const cluster::v1::StatusAnswer& status) {
  const auto find = [&](const std::string& name) -> const cluster::v1::Child* {
    for (const cluster::v1::Child& child : status.children()) {
      if (child.name() == name) return &child;
    }
    return nullptr;
  };
  std::vector<const cluster::v1::Child*> starting, draining;
  for (const cluster::v1::Child& started : scaled.started()) {
    const cluster::v1::Child* child = find(started.name());
    // One that somebody else has drained since is no longer ours to wait for.
    if (child == nullptr || child->state() == cluster::v1::CHILD_STATE_DRAINING) continue;
    if (child->state() == cluster::v1::CHILD_STATE_ENDED) {
      return absl::UnavailableError(StrCat(child->name(), " (pid ", child->pid(), ") has died"));
    }
    if (child->state() != cluster::v1::CHILD_STATE_RUNNING) starting.push_back(child);
  }
  for (const cluster::v1::Child& drained : scaled.draining()) {
    if (const cluster::v1::Child* child = find(drained.name()); child != nullptr) draining.push_back(child);
  }
  std::string left;
  if (!starting.empty()) StrAppend(&left, "starting: ", Names(starting));
  if (!draining.empty()) StrAppend(&left, left.empty() ? "" : "; ", "draining: ", Names(draining));
  return left;
}

}  // namespace minke::cli
