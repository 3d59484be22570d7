// The router's placement policy over simulated time: what would it do with these servers under these loads?
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "cli/plan/loads.h"
#include "services/router/placement/snapshot.h"

namespace minke::cli {

struct SimulateOptions {
  int intervals = 60;
  double interval_s = 10;
  int groups_per_row = 3;
  double newest = 0.3;  // part of an interval in the mean that the policy sees
  router::PlacementOptions policy;
};

struct IntervalResult {
  double step_s = 0;         // predicted, under the interval's own loads
  double balance = 1;        // mean over max of the servers' predicted times, over layers
  double static_step_s = 0;  // of the first placement, if nothing is ever moved or split anew
  double static_balance = 1;
  double fan_out = 0;            // servers that a row reaches in a layer, on average
  int64_t loads = 0, drops = 0;  // begun in the interval
  double bytes_moved = 0;
  double plan_s = 0;  // time that the policy took; the longest, overall
};

// `pool`: shape, replicas and servers, with nothing on them. The first placement knows no loads and is there
// when time begins; in each interval the loads are observed, the policy decides at its end, and loads take
// their time by options.policy.load_bytes_per_s. Deterministic but for plan_s.
std::vector<IntervalResult> Simulate(router::PlacementSnapshot pool, LoadSource loads,
                                     const SimulateOptions& options);

// Sums over intervals: of times and moves; balances as mean time over maximum time.
IntervalResult Overall(const std::vector<IntervalResult>& intervals);

// Different servers that a row of a layer reaches, averaged over layers by rows, as if the groups of a row
// were independent but for their number.
double FanOut(const router::PlacementSnapshot& snapshot, int groups_per_row,
              const std::map<UnitId, std::vector<router::Replica>>& weights);

}  // namespace minke::cli
