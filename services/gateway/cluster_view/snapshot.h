// The cluster as people see it: what GET /cluster shows, docs/console.md. Plain values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "proto/cluster/cluster.pb.h"
#include "services/gateway/cluster_view/traffic_meter.h"

namespace minke::gateway {

enum class MemberState {
  kLoading,  // a member, not able to serve yet
  kReady,
  kDraining,  // about to leave
  kLost,      // left without draining, or routers cannot reach it
  kLeft,      // left in order, a moment ago
};
const char* ToString(MemberState state);

struct MemberSnapshot {
  NodeId id;
  cluster::v1::Role role = cluster::v1::ROLE_UNSPECIFIED;
  std::string address;  // gRPC, else the data plane's; empty: none
  uint32_t pid = 0;     // 0: unknown
  MemberState state = MemberState::kLoading;
  std::string detail;  // why it is not ready, for people
  absl::Time since;    // in this state
  uint32_t units = 0;  // expert servers: (layer, group) units published on it
  cluster::v1::MemberLoad load;
};

struct ClusterEvent {
  uint64_t number = 0;  // ascending from 1
  absl::Time at;
  const char* kind =
      "";  // joined, ready, unready, draining, left, lost, epoch, leader, cluster, failover, operator
  std::string text;
  NodeId node;         // 0: none
  uint64_t count = 0;  // events of a kind that counts: how much so far
};

struct ClusterSnapshot {
  absl::Time at;
  bool registry_connected = false;
  bool ready = false;
  std::string not_ready_reason;
  Epoch epoch;
  NodeId leader;                        // 0: nobody, or not known yet
  std::vector<MemberSnapshot> members;  // in the order in which they were first seen
  std::vector<uint32_t> layers;         // with experts, ascending
  std::vector<ClusterEvent> events;     // oldest first
};

// What the gateway knows beside the cluster.
struct GatewaySnapshot {
  NodeId id;
  std::string version, model;
  uint32_t context_length = 0;
  bool chat = false;
  std::string registry;          // static | etcd
  bool operated = false;         // it can be asked to scale and to drain
  std::string not_ready_reason;  // of /health; empty: it serves
  int64_t sequences = 0;
  TrafficMeter::Summary traffic;
};

// One line of JSON, docs/console.md.
std::string ToJson(const ClusterSnapshot& cluster, const GatewaySnapshot& gateway);

}  // namespace minke::gateway
