// A process's membership by the one router of a static cluster: registers with it, renews its lease, receives
// the cluster's view. Reconnects for ever, with a pause. Thread-safe.
#pragma once

#include <memory>
#include <string>

#include "libs/registry/registry.h"

namespace minke::registry {

class StaticRegistry final : public Registry {
 public:
  // router_address: host:port of the router's gRPC server. identity: null for plaintext.
  StaticRegistry(std::string router_address, std::shared_ptr<tls::Identity> identity,
                 cluster::v1::MemberReport report, OnUpdate on_update, OnRefused on_refused);
  ~StaticRegistry() override;

  void SetReport(cluster::v1::MemberReport report) override;
  bool connected() const override;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace minke::registry
