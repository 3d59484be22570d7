#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/telemetry/histogram.h"
#include "libs/telemetry/page.h"
#include "libs/telemetry/per_node.h"

namespace minke::telemetry {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Histogram, UpperEndsAreInclusive) {
  Histogram histogram({1, 2, 4});
  for (const double value : {0.5, 1.0, 1.5, 2.0, 4.0, 4.5}) histogram.Observe(value);
  const HistogramSnapshot snapshot = histogram.Snapshot();
  EXPECT_THAT(snapshot.counts, ElementsAre(2u, 2u, 1u, 1u));
  EXPECT_EQ(snapshot.count(), 6u);
  EXPECT_DOUBLE_EQ(snapshot.sum, 13.5);
}

TEST(Histogram, TakesRepeatedValuesAtOnceAndIgnoresWhatIsNoNumber) {
  Histogram histogram({1});
  histogram.Observe(0.25, 8);
  histogram.Observe(std::nan(""));
  histogram.Observe(0.5, 0);
  EXPECT_THAT(histogram.Snapshot().counts, ElementsAre(8u, 0u));
  EXPECT_DOUBLE_EQ(histogram.Snapshot().sum, 2);
}

TEST(Histogram, LosesNothingBetweenThreads) {
  Histogram histogram({0.5, 1.5});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10'000; ++i) histogram.Observe(i % 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const HistogramSnapshot snapshot = histogram.Snapshot();
  EXPECT_EQ(snapshot.count(), 40'000u);
  EXPECT_DOUBLE_EQ(snapshot.sum, 4 * (3333 * 1 + 3333 * 2));
}

TEST(Page, RendersEveryTypeUnderItsWholeName) {
  Page page;
  page.Counter("minke:rows_total", "Rows", 12, {{"layer", "1"}});
  page.Gauge("minke:replicas", "Replicas", 2);
  Histogram histogram({0.1, 1});
  histogram.Observe(0.5);
  histogram.Observe(3);
  page.Add("minke:time_seconds", "Time", histogram.Snapshot(), {{"server", "a"}});
  page.Summary("minke:load_seconds", "Loading", 1.5, 3);
  page.Counter("minke:rows_total", "Rows", 7, {{"layer", "2"}});  // gathers with the first
  EXPECT_EQ(RenderText(page), R"(# HELP minke:rows_total Rows
# TYPE minke:rows_total counter
minke:rows_total{layer="1"} 12
minke:rows_total{layer="2"} 7
# HELP minke:replicas Replicas
# TYPE minke:replicas gauge
minke:replicas 2
# HELP minke:time_seconds Time
# TYPE minke:time_seconds histogram
minke:time_seconds_count{server="a"} 2
minke:time_seconds_sum{server="a"} 3.5
minke:time_seconds_bucket{server="a",le="0.1"} 0
minke:time_seconds_bucket{server="a",le="1"} 1
minke:time_seconds_bucket{server="a",le="+Inf"} 2
# HELP minke:load_seconds Loading
# TYPE minke:load_seconds summary
minke:load_seconds_count 3
minke:load_seconds_sum 1.5
)");
}

TEST(Page, EscapesLabelValues) {
  Page page;
  page.Gauge("minke:info", "What", 1, {{"name", "a\"b\\c\nd"}});
  EXPECT_THAT(RenderText(page), HasSubstr(R"(minke:info{name="a\"b\\c\nd"} 1)"));
}

TEST(Page, ADeclaredFamilyIsThereWithoutSeries) {
  Page page;
  page.Declare("minke:balance_factor", "Balance", MetricType::kGauge);
  EXPECT_THAT(RenderText(page), HasSubstr("# TYPE minke:balance_factor gauge\n"));
  ASSERT_NE(page.Find("minke:balance_factor"), nullptr);
  EXPECT_EQ(page.Find("minke:other"), nullptr);
}

TEST(PerNode, KeepsOnlyNodesThatAreStillThere) {
  PerNode<std::atomic<int>> counters;
  const auto make = [] { return std::make_unique<std::atomic<int>>(0); };
  counters.Get(NodeId{1}, make) += 5;
  counters.Get(NodeId{2}, make) += 7;
  counters.Get(NodeId{1}, make) += 1;
  counters.Retain([](NodeId node) { return node == NodeId{1}; });
  int visited = 0;
  counters.ForEach([&](NodeId node, const std::atomic<int>& value) {
    ++visited;
    EXPECT_EQ(node, NodeId{1});
    EXPECT_EQ(value, 6);
  });
  EXPECT_EQ(visited, 1);
}

TEST(PerNode, IsReadWhileItsOwnerAddsAndDrops) {
  PerNode<std::atomic<uint64_t>> counters;
  std::atomic<bool> stop{false};
  std::thread reader([&] {
    while (!stop.load()) {
      uint64_t sum = 0;
      counters.ForEach([&](NodeId, const std::atomic<uint64_t>& value) { sum += value.load(); });
      EXPECT_LE(sum, 100'000u);
    }
  });
  const auto make = [] { return std::make_unique<std::atomic<uint64_t>>(0); };
  for (uint64_t i = 0; i < 100'000; ++i) {
    counters.Get(NodeId{1 + i % 50}, make).fetch_add(1);
    if (i % 1000 == 999) counters.Retain([&](NodeId node) { return node.value % 2 == i / 1000 % 2; });
  }
  stop.store(true);
  reader.join();
  uint64_t left = 0;
  counters.ForEach([&](NodeId, const std::atomic<uint64_t>& value) { left += value.load(); });
  EXPECT_GT(left, 0u);
}

}  // namespace
}  // namespace minke::telemetry
