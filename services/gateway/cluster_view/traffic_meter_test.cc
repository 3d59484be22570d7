#include "services/gateway/cluster_view/traffic_meter.h"

#include "gtest/gtest.h"
#include "services/gateway/cluster_view/metered_pool.h"

namespace minke::gateway {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

const TrafficMeter::Clock::time_point kStart = TrafficMeter::Clock::now();

TEST(DurationHistogram, EmptyHasNoQuantiles) {
  EXPECT_FALSE(DurationHistogram().QuantileMs(0.5).has_value());
}

TEST(DurationHistogram, QuantilesAreWithinSixPercent) {
  DurationHistogram histogram;
  for (int ms = 1; ms <= 1000; ++ms) histogram.Add(milliseconds(ms), 1);
  EXPECT_NEAR(*histogram.QuantileMs(0.5), 500, 30);
  EXPECT_NEAR(*histogram.QuantileMs(0.95), 950, 57);
  EXPECT_NEAR(*histogram.QuantileMs(1), 1000, 60);
}

TEST(DurationHistogram, WhatIsBeyondItsRangeCountsAtTheEnds) {
  DurationHistogram histogram;
  histogram.Add(std::chrono::nanoseconds(-5), 1);
  histogram.Add(std::chrono::hours(100), 1);
  EXPECT_LT(*histogram.QuantileMs(0), 0.2);
  EXPECT_GT(*histogram.QuantileMs(1), 1e6);
}

TEST(TrafficMeter, ASecondThatRunsIsNotShownYet) {
  TrafficMeter meter(kStart);
  meter.OnTokens(kStart, 7, milliseconds(5), true);
  EXPECT_EQ(meter.Summarise(kStart + milliseconds(900)).series.back().tokens, 0u);
  EXPECT_EQ(meter.Summarise(kStart + milliseconds(1000)).series.back().tokens, 7u);
}

TEST(TrafficMeter, RatesAndLatenciesAreOfTheLastMinute) {
  TrafficMeter meter(kStart);
  for (int second = 0; second < 100; ++second) {
    const auto now = kStart + seconds(second);
    meter.OnStart(now, 50);
    meter.OnTokens(now, 1, milliseconds(second < 40 ? 4000 : 200), true);
    meter.OnTokens(now, 9, milliseconds(90), false);  // 10 ms each
  }
  meter.OnFailure(kStart + seconds(10));
  meter.OnFailure(kStart + seconds(80));
  const TrafficMeter::Summary summary = meter.Summarise(kStart + seconds(100));
  EXPECT_DOUBLE_EQ(summary.tokens_per_s, 10);
  EXPECT_DOUBLE_EQ(summary.prompt_tokens_per_s, 50);
  EXPECT_DOUBLE_EQ(summary.sequences_per_s, 1);
  EXPECT_EQ(summary.failed, 1u);
  EXPECT_NEAR(*summary.first_token.p95_ms, 200, 12);  // the slow ones are too old
  EXPECT_NEAR(*summary.token.p50_ms, 10, 0.6);
  ASSERT_EQ(summary.series.size(), static_cast<size_t>(TrafficMeter::kSeriesSeconds));
  EXPECT_EQ(summary.series.back().tokens, 10u);
  EXPECT_EQ(summary.series[TrafficMeter::kSeriesSeconds - 101].tokens, 0u);  // before the start
  EXPECT_NEAR(*summary.series[TrafficMeter::kSeriesSeconds - 100].first_token_ms, 4000, 240);
}

TEST(TrafficMeter, ALateLookFindsNothingOld) {
  TrafficMeter meter(kStart);
  meter.OnTokens(kStart + seconds(5), 100, milliseconds(5), true);
  const TrafficMeter::Summary summary = meter.Summarise(kStart + std::chrono::hours(1));
  EXPECT_EQ(summary.tokens_per_s, 0);
  EXPECT_FALSE(summary.first_token.p50_ms.has_value());
  for (const TrafficMeter::Second& second : summary.series) EXPECT_EQ(second.tokens, 0u);
}

// Remembers what it was given.
class FakePool final : public SequencePool {
 public:
  uint64_t Start(SequenceSpec, std::shared_ptr<SequenceSink> sink) override {
    sink_ = std::move(sink);
    return 3;
  }
  void Cancel(uint64_t sequence) override { cancelled_ = sequence; }
  std::shared_ptr<SequenceSink> sink_;
  uint64_t cancelled_ = 0;
};

class CountingSink final : public SequenceSink {
 public:
  void OnEvent(SequenceEvent event) override { tokens_ += event.token_ids.size(); }
  size_t tokens_ = 0;
};

TEST(MeteredPool, EventsPassAndAreCounted) {
  FakePool pool;
  TrafficMeter meter(TrafficMeter::Clock::now() - seconds(2));
  MeteredPool metered(&pool, &meter);
  const auto sink = std::make_shared<CountingSink>();
  EXPECT_EQ(metered.Start({std::make_shared<TokenIds>(TokenIds{1, 2, 3}), {}}, sink), 3u);
  pool.sink_->OnEvent({.token_ids = {4}});
  pool.sink_->OnEvent({});  // prompt log-probabilities and the like are no tokens
  pool.sink_->OnEvent({.token_ids = {5, 6}});
  pool.sink_->OnEvent({.finish = FinishReason::kError, .error = absl::UnavailableError("gone")});
  metered.Cancel(3);
  EXPECT_EQ(pool.cancelled_, 3u);
  EXPECT_EQ(sink->tokens_, 3u);
  const TrafficMeter::Summary summary = meter.Summarise(TrafficMeter::Clock::now() + seconds(1));
  EXPECT_DOUBLE_EQ(summary.tokens_per_s * 3, 3);
  EXPECT_DOUBLE_EQ(summary.prompt_tokens_per_s * 3, 3);
  EXPECT_EQ(summary.failed, 1u);
  EXPECT_TRUE(summary.first_token.p50_ms.has_value());
  EXPECT_TRUE(summary.token.p50_ms.has_value());
}

}  // namespace
}  // namespace minke::gateway
