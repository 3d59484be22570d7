// The servers of one (layer, group), and how its rows are shared out among them.
#pragma once

#include <vector>

#include "libs/base/ids.h"

namespace minke::cluster {

struct ReplicaSet {
  std::vector<NodeId> servers;  // ascending
  std::vector<float> weights;   // one per server: shares of the unit's rows; none: all go to the same one
};

}  // namespace minke::cluster
