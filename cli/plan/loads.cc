#include "cli/plan/loads.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libs/base/json_depth.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"
#include "services/router/placement/placement_table.h"

namespace minke::cli {
namespace {

using Json = nlohmann::json;
using router::UnitLoad;

// Chance that a layer without a burst begins one, its height and its length in intervals.
constexpr double kBurstChance = 0.05, kBurstFactor = 8;
constexpr int kBurstIntervals = 5;

// One [layers][groups] table of an interval into `set(load, value)`.
template <typename Set>
absl::Status ReadTable(const ModelConfig& config, const Json& table, const std::string& where,
                       std::vector<UnitLoad>& loads, const Set& set) {
  const size_t layers = config.MoeLayers().size(), groups = config.placement_groups();
  const auto fail = [&](const std::string& at, const Json& found) {
    return absl::InvalidArgumentError(StrCat(at, ": expected ", layers, " layers of ", groups,
                                             " numbers of at least 0, found ", found.dump().substr(0, 60)));
  };
  if (!table.is_array() || table.size() != layers) return fail(where, table);
  for (size_t layer = 0; layer < layers; ++layer) {
    const Json& row = table[layer];
    if (!row.is_array() || row.size() != groups) return fail(StrCat(where, "[", layer, "]"), row);
    for (size_t group = 0; group < groups; ++group) {
      const Json& value = row[group];
      if (!value.is_number() || !(value.get<double>() >= 0) || !std::isfinite(value.get<double>()))
        return fail(StrCat(where, "[", layer, "][", group, "]"), value);
      set(loads[layer * groups + group], value.get<double>());
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<double> CapShares(std::vector<double> shares, double most) {
  const double count = static_cast<double>(shares.size());
  if (most * count <= 1) return std::vector<double>(shares.size(), 1 / count);
  std::vector<bool> capped(shares.size());
  while (true) {
    double left = 1, open = 0;
    for (size_t i = 0; i < shares.size(); ++i) {
      if (capped[i]) {
        left -= most;
      } else {
        open += shares[i];
      }
    }
    bool again = false;
    for (size_t i = 0; i < shares.size(); ++i) {
      if (capped[i]) continue;
      shares[i] = open > 0 ? shares[i] * left / open : left / count;
      if (shares[i] > most) capped[i] = again = true;
    }
    for (size_t i = 0; i < shares.size(); ++i) {
      if (capped[i]) shares[i] = most;
    }
    if (!again) return shares;
  }
}

LoadSource LoadSource::Recorded(std::vector<std::vector<UnitLoad>> intervals) {
  MK_CHECK(!intervals.empty());
  LoadSource source;
  source.recorded_ = std::move(intervals);
  return source;
}

LoadSource LoadSource::Synthetic(const ModelConfig& config, const SyntheticLoads& options) {
  LoadSource source;
  source.options_ = options;
  source.groups_per_row_ = config.fan_out_max();
  source.random_.seed(options.seed);
  for (const int32_t id : config.MoeLayers()) {
    Layer& layer = source.layers_.emplace_back();
    layer.id = static_cast<uint32_t>(id);
    layer.rank.resize(config.placement_groups());
    std::iota(layer.rank.begin(), layer.rank.end(), 1);
    std::shuffle(layer.rank.begin(), layer.rank.end(), source.random_);
    layer.next_rank = layer.rank;
    std::shuffle(layer.next_rank.begin(), layer.next_rank.end(), source.random_);
  }
  return source;
}

std::vector<double> LoadSource::Shares(Layer& layer) {
  const bool drifting = options_.pattern == LoadPattern::kDrifting;
  const int64_t phase = interval_ % std::max(1, options_.drift_period);
  if (drifting && interval_ > 0 && phase == 0) {
    layer.rank = layer.next_rank;
    std::shuffle(layer.next_rank.begin(), layer.next_rank.end(), random_);
  }
  if (layer.burst_left > 0) {
    --layer.burst_left;
  } else if (options_.pattern == LoadPattern::kBursty &&
             std::uniform_real_distribution<double>()(random_) < kBurstChance) {
    layer.burst_group =
        std::uniform_int_distribution<int>(0, static_cast<int>(layer.rank.size()) - 1)(random_);
    layer.burst_left = kBurstIntervals;
  }
  const double there = drifting ? static_cast<double>(phase) / options_.drift_period : 0;
  std::normal_distribution<double> normal;
  std::vector<double> shares;
  for (size_t group = 0; group < layer.rank.size(); ++group) {
    const double rank =
        std::exp((1 - there) * std::log(layer.rank[group]) + there * std::log(layer.next_rank[group]));
    double share = std::pow(rank, -options_.zipf);
    if (options_.noise > 0) share *= std::exp(options_.noise * normal(random_));
    if (layer.burst_left > 0 && static_cast<int>(group) == layer.burst_group) share *= kBurstFactor;
    shares.push_back(share);
  }
  return CapShares(std::move(shares), 1 / groups_per_row_);
}

std::vector<UnitLoad> LoadSource::Next() {
  if (!recorded_.empty()) return recorded_[interval_++ % recorded_.size()];
  std::vector<UnitLoad> loads;
  for (Layer& layer : layers_) {
    const std::vector<double> shares = Shares(layer);
    for (uint32_t group = 0; group < shares.size(); ++group) {
      loads.push_back({{layer.id, group}, options_.rows * groups_per_row_ * shares[group]});
    }
  }
  ++interval_;
  return loads;
}

absl::StatusOr<std::vector<std::vector<UnitLoad>>> ParseLoads(const ModelConfig& config,
                                                              std::string_view text) {
  if (NestsTooDeep(text))
    return absl::InvalidArgumentError(
        StrCat("expected at most ", kJsonDepthMax, " levels of nesting, found more"));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto found = json.is_object() ? json.find("intervals") : json.end();
  if (!json.is_object() || found == json.end() || !found->is_array() || found->empty())
    return absl::InvalidArgumentError("expected an object with \"intervals\", a list of at least one");
  std::vector<std::vector<UnitLoad>> intervals;
  for (size_t i = 0; i < found->size(); ++i) {
    const Json& interval = (*found)[i];
    const std::string where = StrCat("intervals[", i, "]");
    if (!interval.is_object() || !interval.contains("rows"))
      return absl::InvalidArgumentError(StrCat(where, ": expected an object with \"rows\""));
    std::vector<UnitLoad>& loads = intervals.emplace_back();
    for (const UnitId unit : router::AllUnits(config)) loads.push_back({unit});
    MK_RETURN_IF_ERROR(ReadTable(config, interval["rows"], where + ".rows", loads,
                                 [](UnitLoad& load, double value) { load.rows = value; }));
    if (!interval.contains("experts")) continue;
    MK_RETURN_IF_ERROR(ReadTable(config, interval["experts"], where + ".experts", loads,
                                 [](UnitLoad& load, double value) { load.experts = value; }));
  }
  return intervals;
}

}  // namespace minke::cli
