// What etcd holds of a cluster, and how a key that changes there changes what a process knows. Pure;
// thread-compatible.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "libs/base/ids.h"
#include "libs/cluster/make_view.h"
#include "libs/etcd/client.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::registry {

// All that processes of a cluster agree about, by name (docs/registry.md).
struct EtcdKeys {
  explicit EtcdKeys(const std::string& cluster);
  std::string Member(NodeId id) const { return members + ToString(id); }
  const std::string root, members, model, placement, leader;
};

// As far as this process knows.
struct EtcdState {
  uint64_t version = 0;                 // another one: something below may have changed
  bool synced = false;                  // followed at the moment; false: an outage
  cluster::Members members;             // with those kept for a lease after an outage
  cluster::v1::PlacementRecord record;  // the last one known
  int64_t record_revision = 0;          // of its last change; 0: etcd has none
  NodeId leader;                        // 0: nobody
  int64_t leader_revision = 0;          // at which it became the leader
  int64_t leader_lease = 0;
};

// 0: not an id.
NodeId ParseNodeId(std::string_view hex);

struct Learned {
  bool more = false;   // something other than a member's load
  bool loads = false;  // loads or the leader: what gateways are told beside the view
};
// A key was put. A value that is no report or no sound record, or a member under another's key, is logged and
// does not count. A member that was `kept` is back.
Learned ApplyPut(const EtcdKeys& keys, const etcd::KeyValue& kv, EtcdState& state, std::set<NodeId>& kept);

}  // namespace minke::registry
