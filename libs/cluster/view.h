// From the control plane's messages to the domain types engines use.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "libs/base/ids.h"
#include "libs/cluster/replica_set.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::cluster {

// Data-plane addresses of the members of one role.
inline std::map<NodeId, std::string> DataAddresses(const v1::ClusterView& view, v1::Role role) {
  std::map<NodeId, std::string> addresses;
  for (const v1::Member& member : view.members()) {
    if (member.role() == role && !member.data_address().empty())
      addresses[NodeId{member.node_id()}] = member.data_address();
  }
  return addresses;
}

inline std::map<UnitId, ReplicaSet> Replicas(const v1::ClusterView& view) {
  std::map<UnitId, ReplicaSet> units;
  for (const v1::UnitReplicas& unit : view.placement()) {
    ReplicaSet& replicas = units[{unit.unit().layer(), unit.unit().group()}];
    for (const uint64_t id : unit.node_ids()) replicas.servers.push_back(NodeId{id});
    if (unit.weights_size() == unit.node_ids_size())
      replicas.weights.assign(unit.weights().begin(), unit.weights().end());
  }
  return units;
}

inline Epoch EpochOf(const v1::ClusterView& view) { return {view.epoch().term(), view.epoch().counter()}; }

}  // namespace minke::cluster
