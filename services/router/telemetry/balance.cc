#include "services/router/telemetry/balance.h"

#include <algorithm>
#include <numeric>

#include "libs/base/status.h"

namespace minke::router {

LayerBalance ComputeBalance(const BalanceShape& shape, const LayerLoad& load, int64_t servers) {
  MK_CHECK(load.rows > 0 && load.scores.size() == load.selections.size());
  const double rows = static_cast<double>(load.rows), k = shape.experts_per_row;
  const double experts = static_cast<double>(load.selections.size());
  LayerBalance balance;
  for (size_t i = 0; i < load.selections.size(); ++i) {
    const double f = experts / (k * rows) * static_cast<double>(load.selections[i]);
    balance.expert += f * load.scores[i] / rows;
    balance.expert_load_max = std::max(balance.expert_load_max, f);
  }
  if (load.servers.empty()) return balance;

  const size_t groups = load.servers.front().pairs.size();
  const size_t group_size = load.selections.size() / groups;
  std::vector<double> group_score(groups), group_pairs(groups);  // P of the group; pairs sent for it
  for (size_t i = 0; i < load.scores.size(); ++i) group_score[i / group_size] += load.scores[i] / rows;
  for (const ServerLoad& server : load.servers) {
    for (size_t g = 0; g < groups; ++g) group_pairs[g] += static_cast<double>(server.pairs[g]);
  }
  const double devices = static_cast<double>(std::max<int64_t>(servers, std::ssize(load.servers)));
  for (const ServerLoad& server : load.servers) {
    double pairs = 0, score = 0;
    for (size_t g = 0; g < groups; ++g) {
      const double here = static_cast<double>(server.pairs[g]);
      pairs += here;
      if (here > 0) score += group_score[g] * here / group_pairs[g];
    }
    const double f = devices / (k * rows) * pairs;
    balance.device += f * score;
    balance.device_load_max = std::max(balance.device_load_max, f);
    balance.communication +=
        devices / (shape.servers_per_row * rows) * static_cast<double>(server.rows) * score;
    balance.over_budget_fraction += std::max(0.0, pairs - k * rows / devices) / (k * rows);
  }
  return balance;
}

LayerLoad Since(const LayerLoad& now, const LayerLoad& before) {
  LayerLoad since = now;
  since.rows -= before.rows;
  for (size_t i = 0; i < since.selections.size(); ++i) since.selections[i] -= before.selections[i];
  for (size_t i = 0; i < since.scores.size(); ++i) since.scores[i] -= before.scores[i];
  for (ServerLoad& server : since.servers) {
    const auto old = std::find_if(before.servers.begin(), before.servers.end(),
                                  [&](const ServerLoad& b) { return b.server == server.server; });
    if (old == before.servers.end() || old->rows > server.rows) continue;  // it is counted anew
    server.rows -= old->rows;
    for (size_t g = 0; g < server.pairs.size(); ++g) server.pairs[g] -= old->pairs[g];
  }
  std::erase_if(since.servers, [](const ServerLoad& server) { return server.rows == 0; });
  return since;
}

}  // namespace minke::router
