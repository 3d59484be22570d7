// A process's membership in the cluster: registers with the router, renews its lease, receives the cluster's
// view. Reconnects for ever, with a pause. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::rpc {

class MembershipClient {
 public:
  // Called on the client's own thread with every update that carries a view.
  using OnUpdate = std::function<void(const cluster::v1::ClusterUpdate&)>;
  // Called when the router refuses this process for good (another model or precision). May end the process.
  using OnRefused = std::function<void(const absl::Status&)>;

  static std::unique_ptr<MembershipClient> Start(std::string router_address, cluster::v1::MemberReport report,
                                                 OnUpdate on_update, OnRefused on_refused);
  ~MembershipClient();

  // Replaces the report; it is sent at once and with every renewal.
  void SetReport(cluster::v1::MemberReport report);
  bool connected() const;

 private:
  struct Impl;
  explicit MembershipClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::rpc
