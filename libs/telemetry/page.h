// What one scrape of a process shows: metric families, filled by the services at that moment from counters of
// their own, so that counting costs the hot path nothing but relaxed atomics.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "libs/telemetry/histogram.h"

namespace minke::telemetry {

using Labels = std::vector<std::pair<std::string, std::string>>;

enum class MetricType : uint8_t { kCounter, kGauge, kHistogram, kSummary };

// One series, or one set of them for a histogram or summary.
struct Point {
  Labels labels;
  double value = 0;             // counters, gauges
  HistogramSnapshot histogram;  // histograms
  double sum = 0;               // summaries: without quantiles, which cannot be added up over processes
  uint64_t count = 0;
};

struct Family {
  std::string name;  // whole: "minke:fan_out_servers"; what is counted ends in "_total"
  std::string help;
  MetricType type = MetricType::kGauge;
  std::vector<Point> points;
};

// Thread-compatible. Points of one name gather in one family, wherever they come from; a name keeps the type
// and help of its first point.
class Page {
 public:
  void Counter(std::string_view name, std::string_view help, double value, Labels labels = {});
  void Gauge(std::string_view name, std::string_view help, double value, Labels labels = {});
  void Add(std::string_view name, std::string_view help, HistogramSnapshot histogram, Labels labels = {});
  void Summary(std::string_view name, std::string_view help, double sum, uint64_t count, Labels labels = {});
  // A family that is there even while it has no series.
  Family& Declare(std::string_view name, std::string_view help, MetricType type);

  const std::deque<Family>& families() const { return families_; }
  const Family* Find(std::string_view name) const;  // null: none of that name

 private:
  std::deque<Family> families_;  // stable while it grows; in order of first use
  absl::flat_hash_map<std::string, Family*> by_name_;
};

// Prometheus' text format, version 0.0.4.
std::string RenderText(const Page& page);
inline constexpr char kTextContentType[] = "text/plain; version=0.0.4; charset=utf-8";

}  // namespace minke::telemetry
