// What every process sees of the cluster, from what the registry keeps: members and the placement's record.
#pragma once

#include <map>

#include "libs/base/ids.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::cluster {

// By id, as the registry knows them now.
using Members = std::map<NodeId, v1::MemberReport>;

// Replicas of members that are gone are left out. Ready: every unit of the record has a server, and a router
// and an attention node are ready.
v1::ClusterView MakeView(const Members& members, const v1::PlacementRecord& record);

}  // namespace minke::cluster
