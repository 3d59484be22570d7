// A process's place in the cluster: it says what it is and hears who else is there and which expert server
// hosts what. Two ways, one behaviour (registry_test.cc):
//   static  one router keeps members and placement in its memory; every other process holds a stream to it.
//   etcd    members and placement lie in etcd (3.4 or later); several routers, of which one at a time
//   decides.
// An outage of either stops changes, not serving: the last view stays in force, and members that are absent
// when the registry is back are kept for a lease.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/tls/identity.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::registry {

// Where the registry is.
struct RegistryAddress {
  std::string router;   // static: host:port of the router's gRPC server
  std::string etcd;     // etcd: host:port[,host:port...]; not empty: this one
  std::string cluster;  // etcd: clusters that share one etcd are told apart by this name
  std::shared_ptr<tls::Identity> identity = nullptr;  // at the router, or at etcd; null: plaintext
};

// Thread-safe.
class Registry {
 public:
  // Called on the registry's own thread with every update that carries a view; for gateways also with those
  // that carry the members' statuses only.
  using OnUpdate = std::function<void(const cluster::v1::ClusterUpdate&)>;
  // Called when the cluster refuses this process for good (another model or precision). May end the process.
  using OnRefused = std::function<void(const absl::Status&)>;

  virtual ~Registry() = default;  // leaves: others see it go at once
  // Replaces the report; it is sent at once and kept alive.
  virtual void SetReport(cluster::v1::MemberReport report) = 0;
  virtual bool connected() const = 0;
};

// Joins, and joins again for ever after an outage.
std::unique_ptr<Registry> Join(const RegistryAddress& address, cluster::v1::MemberReport report,
                               Registry::OnUpdate on_update, Registry::OnRefused on_refused);

}  // namespace minke::registry
