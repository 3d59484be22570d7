#include "libs/registry/etcd_registry.h"
#include "libs/registry/registry.h"
#include "libs/registry/static_registry.h"

namespace minke::registry {

std::unique_ptr<Registry> Join(const RegistryAddress& address, cluster::v1::MemberReport report,
                               Registry::OnUpdate on_update, Registry::OnRefused on_refused) {
  if (address.etcd.empty()) {
    return std::make_unique<StaticRegistry>(address.router, address.identity, std::move(report),
                                            std::move(on_update), std::move(on_refused));
  }
  return std::make_unique<EtcdRegistry>(EtcdOptions{.endpoints = SplitEndpoints(address.etcd),
                                                    .cluster = address.cluster,
                                                    .identity = address.identity},
                                        std::move(report), std::move(on_update), std::move(on_refused));
}

}  // namespace minke::registry
