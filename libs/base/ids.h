// Strong identifiers: explicit both ways, so that a layer is never taken for a group.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"

namespace minke {

// One process start: a random non-zero 64-bit number ("incarnation" in docs/wire_format.md). A restarted
// process is another node, so nothing addressed to its former life can reach it.
struct NodeId {
  uint64_t value = 0;
  friend auto operator<=>(NodeId, NodeId) = default;
  template <typename H>
  friend H AbslHashValue(H h, NodeId id) {
    return H::combine(std::move(h), id.value);
  }
};
NodeId RandomNodeId();
inline std::string ToString(NodeId id) { return absl::StrFormat("%016x", id.value); }

// The unit of placement: one contiguous run of routed experts in one layer.
struct UnitId {
  uint32_t layer = 0;  // transformer layer
  uint32_t group = 0;
  friend auto operator<=>(UnitId, UnitId) = default;
  template <typename H>
  friend H AbslHashValue(H h, UnitId id) {
    return H::combine(std::move(h), id.layer, id.group);
  }
};

// Version of the placement table; compared first by term, then by counter.
struct Epoch {
  uint32_t term = 0;
  uint32_t counter = 0;
  friend auto operator<=>(Epoch, Epoch) = default;
};

}  // namespace minke
