// Predicted time of the experts' part of a step: of a server in one layer, the weights it reads over its
// bandwidth plus its rows' arithmetic over its peak; of a layer, the slowest server; of a step, the sum over
// layers. Pure.
#pragma once

#include <span>
#include <vector>

#include "services/router/placement/snapshot.h"

namespace minke::router {

// What a server takes for one expert's weights and for one (row, group).
struct ServerRate {
  double expert_read_s = 0;
  double row_s = 0;
};
ServerRate RateOf(const UnitShape& shape, const ServerSnapshot& server);

// Different experts that `rows` of a unit touch when they choose evenly: E (1 - (1 - 1/E)^(rows k)).
double ExpertsTouchedEvenly(const UnitShape& shape, double rows);
// By the unit's rows of a step: as observed, else evenly.
double ExpertsTouched(const UnitShape& shape, const UnitLoad& load);
// By `rows` of them: the observed number, scaled as for rows that choose evenly.
double ExpertsTouched(const UnitShape& shape, const UnitLoad& load, double rows);

// Rows per expert from which computing takes longer than reading, on average over the servers that stay.
double RidgeRowsPerExpert(const UnitShape& shape, std::span<const ServerSnapshot> servers);

struct LayerTime {
  double max_s = 0;
  double mean_s = 0;  // over the servers that host a unit of the layer
  double balance() const { return max_s > 0 ? mean_s / max_s : 1; }
};
struct StepTime {
  double max_s = 0, mean_s = 0;  // sums over layers
  double balance() const { return max_s > 0 ? mean_s / max_s : 1; }
};
// REQUIRES: every server of `weights` is one of the snapshot's.
StepTime PredictStep(const PlacementSnapshot& snapshot,
                     const std::map<UnitId, std::vector<Replica>>& weights);

}  // namespace minke::router
