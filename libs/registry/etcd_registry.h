// A process's place in a cluster whose members and placement lie in etcd. Keys, leases and what happens in
// which outage: docs/registry.md. Thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "libs/cluster/make_view.h"
#include "libs/registry/etcd_state.h"
#include "libs/registry/registry.h"

namespace minke::registry {

struct EtcdOptions {
  std::vector<std::string> endpoints;  // host:port, at least one
  std::string cluster = "minke";
  absl::Duration lease = absl::Seconds(3);            // whole seconds, at least 2
  std::shared_ptr<tls::Identity> identity = nullptr;  // null: plaintext
};

class EtcdRegistry final : public Registry {
 public:
  EtcdRegistry(EtcdOptions options, cluster::v1::MemberReport report, OnUpdate on_update,
               OnRefused on_refused);
  ~EtcdRegistry() override;

  void SetReport(cluster::v1::MemberReport report) override;
  bool connected() const override;

  // For routers, which elect one of them. Blocks until the version is another one, at most `timeout`.
  EtcdState AwaitState(uint64_t version, absl::Duration timeout) const;
  // Of this process, while it surely holds; otherwise 0.
  int64_t lease() const;
  // Whether this process leads now that nobody did.
  absl::StatusOr<bool> BecomeLeader();
  // Replaces the record if this process leads since `leader_revision` and the record is the one of
  // `record_revision`; otherwise ABORTED. Its new revision.
  absl::StatusOr<int64_t> WriteRecord(const cluster::v1::PlacementRecord& record, int64_t leader_revision,
                                      int64_t record_revision);

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

// "a:1,b:2".
std::vector<std::string> SplitEndpoints(const std::string& endpoints);

}  // namespace minke::registry
