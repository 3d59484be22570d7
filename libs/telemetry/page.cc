#include "libs/telemetry/page.h"

#include <prometheus/text_serializer.h>

#include <limits>

#include "libs/telemetry/prometheus_families.h"

namespace minke::telemetry {
namespace {

prometheus::MetricType ToPrometheus(MetricType type) {
  switch (type) {  // no default: a new type must fail the build
    case MetricType::kCounter:
      return prometheus::MetricType::Counter;
    case MetricType::kGauge:
      return prometheus::MetricType::Gauge;
    case MetricType::kHistogram:
      return prometheus::MetricType::Histogram;
    case MetricType::kSummary:
      return prometheus::MetricType::Summary;
  }
  return prometheus::MetricType::Untyped;
}

prometheus::ClientMetric ToPrometheus(MetricType type, const Point& point) {
  prometheus::ClientMetric metric;
  for (const auto& [name, value] : point.labels) metric.label.push_back({name, value});
  switch (type) {
    case MetricType::kCounter:
      metric.counter.value = point.value;
      break;
    case MetricType::kGauge:
      metric.gauge.value = point.value;
      break;
    case MetricType::kHistogram: {
      const HistogramSnapshot& histogram = point.histogram;
      uint64_t count = 0;
      for (size_t i = 0; i < histogram.counts.size(); ++i) {
        count += histogram.counts[i];
        const bool last = i == histogram.bounds.size();
        metric.histogram.bucket.push_back(
            {count, last ? std::numeric_limits<double>::infinity() : histogram.bounds[i]});
      }
      metric.histogram.sample_count = count;
      metric.histogram.sample_sum = histogram.sum;
      break;
    }
    case MetricType::kSummary:
      metric.summary.sample_count = point.count;
      metric.summary.sample_sum = point.sum;
      break;
  }
  return metric;
}

}  // namespace

Family& Page::Declare(std::string_view name, std::string_view help, MetricType type) {
  const auto [it, fresh] = by_name_.try_emplace(std::string(name), nullptr);
  if (fresh) {
    families_.push_back({std::string(name), std::string(help), type, {}});
    it->second = &families_.back();
  }
  return *it->second;
}

void Page::Counter(std::string_view name, std::string_view help, double value, Labels labels) {
  Declare(name, help, MetricType::kCounter)
      .points.push_back({.labels = std::move(labels), .value = value, .histogram = {}});
}

void Page::Gauge(std::string_view name, std::string_view help, double value, Labels labels) {
  Declare(name, help, MetricType::kGauge)
      .points.push_back({.labels = std::move(labels), .value = value, .histogram = {}});
}

void Page::Add(std::string_view name, std::string_view help, HistogramSnapshot histogram, Labels labels) {
  Declare(name, help, MetricType::kHistogram)
      .points.push_back({.labels = std::move(labels), .histogram = std::move(histogram)});
}

void Page::Summary(std::string_view name, std::string_view help, double sum, uint64_t count, Labels labels) {
  Declare(name, help, MetricType::kSummary)
      .points.push_back({.labels = std::move(labels), .histogram = {}, .sum = sum, .count = count});
}

const Family* Page::Find(std::string_view name) const {
  const auto it = by_name_.find(std::string(name));
  return it == by_name_.end() ? nullptr : it->second;
}

std::vector<prometheus::MetricFamily> ToPrometheus(const Page& page) {
  std::vector<prometheus::MetricFamily> families;
  families.reserve(page.families().size());
  for (const Family& family : page.families()) {
    prometheus::MetricFamily& out = families.emplace_back(
        prometheus::MetricFamily{family.name, family.help, ToPrometheus(family.type), {}});
    out.metric.reserve(family.points.size());
    for (const Point& point : family.points) out.metric.push_back(ToPrometheus(family.type, point));
  }
  return families;
}

std::string RenderText(const Page& page) {
  return prometheus::TextSerializer().Serialize(ToPrometheus(page));
}

}  // namespace minke::telemetry
