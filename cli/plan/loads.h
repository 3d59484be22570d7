// Loads of experts over time, for the simulator: made up, or recorded (docs/placement.md has the format).
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/model/config.h"
#include "services/router/placement/snapshot.h"

namespace minke::cli {

enum class LoadPattern {
  kZipf,      // the same shares throughout; which group is hot differs by layer
  kDrifting,  // hot groups become others, smoothly, over a period
  kBursty,    // now and then a group of a layer gets many times its share for a while
};

struct SyntheticLoads {
  LoadPattern pattern = LoadPattern::kZipf;
  double zipf = 1.2;       // share of the r-th group: r^-zipf
  double noise = 0;        // standard deviation of the logarithm of a share, drawn anew in every interval
  double rows = 32768;     // of a step
  int drift_period = 100;  // intervals until the hot groups are others
  uint64_t seed = 0;
};

// Shares that add up to 1 and exceed `most` nowhere: what is above goes to the others in proportion. A row
// visits a group at most once, so a group's share of the (row, group) pairs cannot exceed 1 / groups per row.
// All equal if `most` leaves no choice.
std::vector<double> CapShares(std::vector<double> shares, double most);

// Thread-compatible.
class LoadSource {
 public:
  // [intervals][units, as AllUnits]; what comes after the last is the first again. REQUIRES: not empty.
  static LoadSource Recorded(std::vector<std::vector<router::UnitLoad>> intervals);
  static LoadSource Synthetic(const ModelConfig& config, const SyntheticLoads& options);

  // Of the next interval; every unit, in the order of AllUnits.
  std::vector<router::UnitLoad> Next();

 private:
  LoadSource() = default;
  struct Layer {
    uint32_t id = 0;
    std::vector<int> rank, next_rank;  // of each group
    int burst_group = -1, burst_left = 0;
  };
  std::vector<double> Shares(Layer& layer);

  std::vector<std::vector<router::UnitLoad>> recorded_;
  SyntheticLoads options_;
  double groups_per_row_ = 1;
  std::vector<Layer> layers_;
  std::mt19937_64 random_;
  int64_t interval_ = 0;
};

// Of a recorded file's text. INVALID_ARGUMENT naming the place, what was expected and found.
absl::StatusOr<std::vector<std::vector<router::UnitLoad>>> ParseLoads(const ModelConfig& config,
                                                                      std::string_view json);

}  // namespace minke::cli
