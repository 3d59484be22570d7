// `minke plan`: the capacity planner (capacity_command.h), or with --simulate the placement policy over
// simulated time.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "cli/capacity_command.h"

namespace CLI {
class App;
}

namespace minke::cli {

struct PlanFlags {
  bool simulate = false;
  PlanModel model;
  CapacityFlags capacity;
  std::string loads = "zipf";  // zipf | drifting | bursty | a recorded file
  double zipf = 1.2;
  double noise = 0.05;
  double rows = 32768;
  int drift_period = 100;
  uint64_t seed = 0;
  int servers = 8;
  int slots_per_layer = 16;
  int hosts = 0;               // 0: every server its own
  std::vector<double> speeds;  // taken in turn
  double bandwidth_gb_s = 4300;
  double peak_tflop_s = 790;
  double load_gb_s = 2;
  int intervals = 60;
  double interval_s = 10;
  std::string json;
};

void AddPlanFlags(CLI::App& app, PlanFlags& flags);
absl::Status RunPlan(const PlanFlags& flags, std::ostream& out);
// The table goes to `out`, or to stderr if the JSON does. REQUIRES: flags.simulate.
absl::Status RunPlanSimulate(const PlanFlags& flags, std::ostream& out);

}  // namespace minke::cli
