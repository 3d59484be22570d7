// Keeps a gateway's own report in the registry up to date: how busy it is, and whether it drains. A thread of
// its own, once a second.
#pragma once

#include <thread>

#include "libs/registry/registry.h"
#include "services/gateway/gateway.h"

namespace minke::gateway {

class SelfReporter {
 public:
  // Both are borrowed and outlive this. `report`: what does not change.
  SelfReporter(Gateway& gateway, registry::Registry& registry, cluster::v1::MemberReport report);
  ~SelfReporter();
  // Others see it at once.
  void SetDraining();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace minke::gateway
