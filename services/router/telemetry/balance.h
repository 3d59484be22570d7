// How evenly a layer's rows fell on experts, on servers and on the ways to them, over some window: the
// paper's balance losses without their factors (arXiv 2405.04434, section 2.2.3), with the servers that
// really hold the experts in place of training's devices. Pure functions.
//
// With N experts, K per row, T rows, D servers of the layer, at most M servers per row, n_i rows that chose
// expert i, p_i,t its softmax score for row t:
//   f_i = N n_i / (K T)         P_i = mean over t of p_i,t
//   B_expert        = sum over i of f_i P_i
//   load_d          = (row, expert) pairs sent to d         P_d = sum of P_i of the experts on d
//   B_device        = sum over d of (D load_d / (K T)) P_d
//   B_communication = sum over d of (D rows_d / (M T)) P_d, rows_d: rows sent to d, each once
// A unit with several replicas counts on each of them by the share of its pairs that went there.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libs/base/ids.h"

namespace minke::router {

// What was counted of one layer.
struct ServerLoad {
  NodeId server;
  uint64_t rows = 0;            // rows sent there, each once
  std::vector<uint64_t> pairs;  // [groups] (row, expert) pairs
};
struct LayerLoad {
  uint64_t rows = 0;                 // gated
  std::vector<uint64_t> selections;  // [experts]
  std::vector<double> scores;        // [experts] sums of softmax scores
  std::vector<ServerLoad> servers;   // that got rows
};

struct BalanceShape {
  int32_t experts_per_row = 1;  // K
  int32_t servers_per_row = 1;  // M: the model's limit
};

struct LayerBalance {
  double expert = 0, device = 0, communication = 0;
  double expert_load_max = 0;       // max f_i: how much longer the busiest expert takes than a mean one
  double device_load_max = 0;       // max D load_d / (K T): the same of servers
  double over_budget_fraction = 0;  // of all pairs: those above a server's even share
};

// `servers`: D, at least as many as got rows. REQUIRES: load.rows > 0, as many scores as selections.
LayerBalance ComputeBalance(const BalanceShape& shape, const LayerLoad& load, int64_t servers);

// What came after `before`, which was counted earlier. Servers that got nothing since are left out, as are
// those that `now` does not know any more.
LayerLoad Since(const LayerLoad& now, const LayerLoad& before);

}  // namespace minke::router
