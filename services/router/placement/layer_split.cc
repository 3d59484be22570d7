#include "services/router/placement/layer_split.h"

#include <algorithm>
#include <numeric>

namespace minke::router {
namespace {

// Of 8 groups on 8 servers the last sweeps change the time by less than a thousandth.
constexpr int kSweepsMax = 24;
constexpr double kConverged = 1e-4;

double TimeOf(const LayerUnit& unit, const ServerRate& rate, double rows) {
  return rows > 0 ? unit.experts * rate.expert_read_s + rows * rate.row_s : 0;
}

void PlaceWhole(LayerUnit& unit, std::span<const ServerRate> rates, std::span<double> times) {
  LayerShare* best = nullptr;
  double best_time = 0;
  for (LayerShare& share : unit.replicas) {
    share.rows = 0;
    const double time = times[share.server] + TimeOf(unit, rates[share.server], unit.rows);
    if (best == nullptr || time < best_time) best = &share, best_time = time;
  }
  if (best == nullptr) return;
  best->rows = unit.rows;
  times[best->server] = best_time;
}

// Takes the unit's rows back and pours them anew over its replicas.
void Pour(LayerUnit& unit, std::span<const ServerRate> rates, std::span<double> times) {
  for (LayerShare& share : unit.replicas) {
    times[share.server] -= TimeOf(unit, rates[share.server], share.rows);
    share.rows = 0;
  }
  const auto floor = [&](const LayerShare& share) {
    return times[share.server] + unit.experts * rates[share.server].expert_read_s;
  };
  std::sort(unit.replicas.begin(), unit.replicas.end(), [&](const LayerShare& a, const LayerShare& b) {
    return std::pair(floor(a), a.server) < std::pair(floor(b), b.server);
  });
  // With the first n replicas the level is (rows + sum floor/row_s) / sum 1/row_s.
  double rates_sum = 0, floors_sum = 0, level = 0;
  for (const LayerShare& share : unit.replicas) {
    if (rates_sum > 0 && floor(share) >= level) break;
    rates_sum += 1 / rates[share.server].row_s;
    floors_sum += floor(share) / rates[share.server].row_s;
    level = (unit.rows + floors_sum) / rates_sum;
  }
  for (LayerShare& share : unit.replicas) {
    const double under = level - floor(share);
    if (under <= 0) break;
    share.rows = under / rates[share.server].row_s;
  }
  for (const LayerShare& share : unit.replicas)
    times[share.server] += TimeOf(unit, rates[share.server], share.rows);
}

}  // namespace

double SplitLayer(std::span<LayerUnit> units, std::span<const ServerRate> rates, std::span<double> times) {
  std::fill(times.begin(), times.end(), 0.0);
  const auto slowest = [&] { return times.empty() ? 0 : *std::max_element(times.begin(), times.end()); };
  // Those without a choice first, then the heavy ones.
  static thread_local std::vector<LayerUnit*> order;
  order.clear();
  for (LayerUnit& unit : units) order.push_back(&unit);
  std::stable_sort(order.begin(), order.end(), [](const LayerUnit* a, const LayerUnit* b) {
    const bool a_fixed = a->replicas.size() < 2, b_fixed = b->replicas.size() < 2;
    return a_fixed != b_fixed ? a_fixed : a->rows > b->rows;
  });
  for (LayerUnit* unit : order) PlaceWhole(*unit, rates, times);
  double before = slowest();
  for (int sweep = 0; sweep < kSweepsMax; ++sweep) {
    bool any = false;
    for (LayerUnit* unit : order) {
      if (!unit->split || unit->replicas.size() < 2 || unit->rows <= 0) continue;
      Pour(*unit, rates, times);
      any = true;
    }
    const double now = slowest();
    if (!any || (sweep > 1 && before - now < kConverged * before)) return now;
    before = now;
  }
  return slowest();
}

}  // namespace minke::router
