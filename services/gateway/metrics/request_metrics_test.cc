#include "services/gateway/metrics/request_metrics.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/gateway/metrics/vllm_names.h"

namespace minke::gateway {
namespace {

using std::chrono::milliseconds;
using testing::DoubleNear;
using testing::ElementsAre;

class Timed : public testing::Test {
 protected:
  static double Sum(const telemetry::Histogram& histogram) { return histogram.Snapshot().sum; }
  static uint64_t Count(const telemetry::Histogram& histogram) { return histogram.Snapshot().count(); }
  uint64_t Ended(SequenceEnd end) const { return metrics_.ended[static_cast<int>(end)]; }

  RequestMetrics metrics_{1000};
  const SequenceTimer::Clock::time_point arrival_ = SequenceTimer::Clock::now() - std::chrono::seconds(10);
};

TEST_F(Timed, PhasesOfASequenceAddUp) {
  SequenceTimer timer(&metrics_, arrival_, 7);
  timer.OnEvent(arrival_ + milliseconds(1000), 1, milliseconds(400));
  timer.OnEvent(arrival_ + milliseconds(1050), 1, milliseconds(0));
  timer.OnEvent(arrival_ + milliseconds(1150), 2, milliseconds(0));  // two tokens in one step
  timer.End(FinishReason::kNone);
  EXPECT_EQ(Count(metrics_.e2e_latency), 0u);
  timer.End(FinishReason::kLength);
  EXPECT_THAT(Sum(metrics_.time_to_first_token), DoubleNear(1.0, 1e-9));
  EXPECT_EQ(Count(metrics_.inter_token_latency), 2u);
  EXPECT_THAT(Sum(metrics_.inter_token_latency), DoubleNear(0.15, 1e-9));
  EXPECT_THAT(Sum(metrics_.queue_time), DoubleNear(0.4, 1e-9));
  EXPECT_THAT(Sum(metrics_.prefill_time), DoubleNear(0.6, 1e-9));
  EXPECT_THAT(Sum(metrics_.decode_time), DoubleNear(0.15, 1e-9));
  EXPECT_THAT(Sum(metrics_.inference_time), DoubleNear(0.75, 1e-9));
  EXPECT_THAT(Sum(metrics_.time_per_output_token), DoubleNear(0.05, 1e-9));
  EXPECT_GE(Sum(metrics_.e2e_latency), 10);
  EXPECT_EQ(Sum(metrics_.prompt_tokens), 7);
  EXPECT_EQ(Sum(metrics_.generation_tokens), 4);
  EXPECT_EQ(Ended(SequenceEnd::kLength), 1u);
}

TEST_F(Timed, ASequenceEndsOnce) {
  {
    SequenceTimer timer(&metrics_, arrival_, 1);
    timer.End(FinishReason::kStop);
    timer.End(SequenceEnd::kError);
    SequenceTimer moved(std::move(timer));
  }
  EXPECT_EQ(Ended(SequenceEnd::kStop), 1u);
  EXPECT_EQ(Ended(SequenceEnd::kError) + Ended(SequenceEnd::kAbort), 0u);
}

TEST_F(Timed, ASequenceThatIsDroppedWasAborted) {
  { SequenceTimer timer(&metrics_, arrival_, 1); }
  EXPECT_EQ(Ended(SequenceEnd::kAbort), 1u);
  EXPECT_EQ(Count(metrics_.prefill_time), 0u);  // it never had a token
}

TEST_F(Timed, BucketsAreThoseOfVllm) {
  EXPECT_THAT(metrics_.time_to_first_token.Snapshot().bounds,
              ElementsAre(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
                          10, 20, 40, 80, 160, 640, 2560));
  EXPECT_THAT(metrics_.inter_token_latency.Snapshot().bounds,
              ElementsAre(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
                          20, 40, 80));
  EXPECT_THAT(metrics_.e2e_latency.Snapshot().bounds,
              ElementsAre(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
                          1920, 7680));
  EXPECT_THAT(metrics_.prompt_tokens.Snapshot().bounds,
              ElementsAre(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000));
}

TEST_F(Timed, EveryRequestFamilyIsThereUnderVllmsName) {
  { SequenceTimer timer(&metrics_, arrival_, 1); }
  telemetry::Page page;
  metrics_.Collect("whale", page);
  const size_t ours = page.families().size();
  AddVllmNames("whale", {}, page);
  // The twelve histograms, one of them twice, and the counter of ends; nothing of engines that nobody has
  // heard of.
  EXPECT_EQ(page.families().size(), ours + 12 + 1 + 1);
  const telemetry::Family& ended = *page.Find("vllm:request_success_total");
  EXPECT_THAT(ended.points[2].labels,
              ElementsAre(std::pair("model_name", "whale"), std::pair("finished_reason", "abort"),
                          std::pair("engine", "0")));
  EXPECT_EQ(ended.points[2].value, 1);
  EXPECT_EQ(page.Find("vllm:num_requests_running"), nullptr);
  AddVllmNames("whale", {.nodes = 2, .running = 3, .pages = 8, .pages_used = 2}, page);
  EXPECT_EQ(page.Find("vllm:num_requests_running")->points[0].value, 3);
  EXPECT_EQ(page.Find("vllm:kv_cache_usage_perc")->points[0].value, 0.25);
}

}  // namespace
}  // namespace minke::gateway
