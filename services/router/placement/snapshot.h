// What the placement policy looks at, and what it answers with. Values only.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "libs/base/ids.h"
#include "libs/model/config.h"

namespace minke::router {

// The same for every unit of a model.
struct UnitShape {
  double unit_bytes = 0;       // of weights, all experts of a group in one layer
  double experts = 1;          // of a group
  double experts_per_row = 1;  // a row's experts within one of its groups, on average
  double flops_per_row = 0;    // of one (row, group), all its experts
  double expert_bytes() const { return unit_bytes / experts; }
};
// element_bytes: of one weight, as the servers hold it.
UnitShape ShapeOfUnits(const ModelConfig& config, double element_bytes);

// Means per step over the observed window.
struct UnitLoad {
  UnitId unit;
  double rows = 0;     // (row, group) pairs
  double experts = 0;  // different experts touched; 0: unknown, taken as if the rows chose evenly
};

struct HostedUnit {
  UnitId unit;
  bool loaded = true;  // false: still loading
  double weight = 0;   // its share of the unit's rows as published now; all 0: none published
};

struct ServerSnapshot {
  static constexpr int64_t kUnlimited = std::numeric_limits<int32_t>::max();
  NodeId id;
  std::string host;             // replicas are spread over hosts; empty: a host of its own
  int64_t slots = kUnlimited;   // units it has room for: bytes for weights / unit_bytes
  int64_t room = kUnlimited;    // at most slots: what it should come back to once nothing moves
  double bytes_per_s = 4.3e12;  // measured reading of weights (default: an H200)
  double flops_per_s = 790e12;  // measured, dense bf16
  double speed = 1;             // factor on both, for servers without a measurement of their own
  bool draining = false;        // its units are to go away
  std::vector<HostedUnit> units;
};

struct PlacementSnapshot {
  UnitShape shape;
  int replicas = 1;                     // of every unit, at least
  std::vector<UnitLoad> units;          // every unit of the model
  std::vector<ServerSnapshot> servers;  // the living ones
};

struct PlacementOptions {
  // A layer is changed only if that takes this share off its predicted time; below lies noise.
  double layer_gain_min = 0.05;
  // New weights are published only if they take this share off a layer's time; they move no bytes.
  double weights_gain_min = 0.02;
  // A load pays if the share of step time it saves, over the horizon, is more than what the cluster loses
  // while it runs: its duration times the slowdown it causes.
  double horizon_s = 300;
  double load_bytes_per_s = 2e9;
  double load_slowdown = 0.1;
  // Rows are split over replicas from this many rows per expert of a unit on; 0: where computing an expert's
  // rows takes as long as reading its weights, by the servers' measurements.
  double split_rows_per_expert = 0;
  // Bounds of one round. Units without any loaded replica are loaded beyond them.
  int loads_max = 16;            // under way at once, everywhere
  int loads_per_server_max = 2;  // under way at once
  int drops_max = 64;
};

struct Replica {
  NodeId server;
  double weight = 0;  // share of the unit's rows; a unit's weights add up to 1
};

struct Move {
  enum class Kind : uint8_t { kLoad, kDrop };
  Kind kind{};
  UnitId unit;
  NodeId server;
  friend bool operator==(const Move&, const Move&) = default;
};

struct PlacementPlan {
  std::map<UnitId, std::vector<NodeId>> desired;  // ascending; every unit, empty if nothing has room
  // Of the replicas loaded now, less those that `moves` drops, by server; empty if there is none. What the
  // table says while the moves are carried out.
  std::map<UnitId, std::vector<Replica>> weights;
  std::vector<Move> moves;    // of this round, the urgent first
  int64_t loads_missing = 0;  // desired replicas not yet loaded
  double step_s = 0;          // predicted, with `weights`
  double desired_step_s = 0;  // predicted, once all desired replicas are loaded
};

}  // namespace minke::router
