// What every process sees of the cluster, from what the registry keeps: members and the placement's record.
#pragma once

#include <map>

#include "libs/base/ids.h"
#include "proto/cluster/cluster.pb.h"

namespace minke::cluster {

// By id, as the registry knows them now.
using Members = std::map<NodeId, v1::MemberReport>;

// What gateways are told beside the view. `leader`: 0 for nobody.
void AddStatuses(const Members& members, NodeId leader, v1::ClusterUpdate& update);
// Whether the cluster's view and placement cannot depend on the difference.
bool OnlyLoadDiffers(const v1::MemberReport& before, const v1::MemberReport& now);

// Replicas of members that are gone are left out. Ready: every unit of the record has a server, and a router
// and an attention node are ready.
v1::ClusterView MakeView(const Members& members, const v1::PlacementRecord& record);

}  // namespace minke::cluster
