#include "cli/bench/statistics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cli/bench/random.h"

namespace minke::cli::bench {
namespace {

using std::chrono::milliseconds;

// The definition, word by word.
double PercentileReference(std::vector<double> samples, double percent) {
  std::sort(samples.begin(), samples.end());
  for (size_t i = 0; i < samples.size(); ++i) {
    if (static_cast<double>(i + 1) * 100 >= percent * static_cast<double>(samples.size())) return samples[i];
  }
  return samples.back();
}

TEST(Percentile, IsTheSortedVectorsOnRandomInputs) {
  Random random(1, Draw::kPrompt, 0);
  for (int round = 0; round < 2000; ++round) {
    std::vector<double> samples(static_cast<size_t>(random.Between(1, 300)));
    const int64_t values = random.Between(1, 1000);  // few values: many ties
    for (double& sample : samples) sample = static_cast<double>(random.Between(-values, values)) / 7;
    for (const double percent : {0.1, 1.0, 25.0, 50.0, 75.0, 90.0, 99.0, 99.9, 100.0}) {
      std::vector<double> copy = samples;
      ASSERT_EQ(Percentile(copy, percent), PercentileReference(samples, percent))
          << percent << " % of " << samples.size();
    }
  }
}

TEST(Summarise, OfNothingAndOfOne) {
  EXPECT_EQ(Summarise({}).count, 0);
  const Summary one = Summarise({3});
  EXPECT_EQ(one.count, 1);
  EXPECT_EQ(one.mean, 3);
  EXPECT_EQ(one.p50, 3);
  EXPECT_EQ(one.p99, 3);
  EXPECT_EQ(one.max, 3);
}

TEST(Summarise, OfAHundred) {
  std::vector<double> samples;
  for (int i = 100; i >= 1; --i) samples.push_back(i);
  const Summary summary = Summarise(samples);
  EXPECT_EQ(summary.mean, 50.5);
  EXPECT_EQ(summary.p50, 50);
  EXPECT_EQ(summary.p90, 90);
  EXPECT_EQ(summary.p99, 99);
  EXPECT_EQ(summary.max, 100);
}

RequestRecord Record(Outcome outcome, const std::vector<std::string>& events) {
  const Clock::time_point begin{};
  RequestRecord record{.outcome = outcome,
                       .scheduled = begin,
                       .sent = begin + milliseconds(5),
                       .end = begin + milliseconds(100),
                       .prompt_tokens_asked = 7};
  int at_ms = 10;
  for (const std::string& event : events)
    record.answer.Feed("data:" + event + "\n\n", begin + milliseconds(at_ms += 10));
  return record;
}

const std::string kText = R"({"choices":[{"text":"x"}]})";

TEST(RunStatistics, CountsUsageFirst) {
  RunStatistics statistics;
  statistics.Add(Record(Outcome::kCompleted,
                        {kText, kText, R"({"usage":{"prompt_tokens":9,"completion_tokens":5}})", "[DONE]"}));
  EXPECT_EQ(statistics.prompt.tokens, 9);
  EXPECT_EQ(statistics.output.tokens, 5);
  EXPECT_EQ(statistics.output.requests, (std::map<CountedBy, int64_t>{{CountedBy::kUsage, 1}}));
  EXPECT_EQ(statistics.first_token_ms,
            (std::vector<double>{20}));  // from when it was due, not when it was sent
  EXPECT_EQ(statistics.per_output_token_ms, (std::vector<double>{10.0 / 4}));
  EXPECT_EQ(statistics.gap_ms, (std::vector<double>{10}));
  EXPECT_EQ(statistics.total_ms, (std::vector<double>{100}));
  EXPECT_EQ(statistics.send_delay_ms, (std::vector<double>{5}));
  EXPECT_DOUBLE_EQ(statistics.busy_s, 0.095);
  EXPECT_FALSE(statistics.cached_tokens);
}

TEST(RunStatistics, WithoutUsageSaysSo) {
  RunStatistics statistics;
  statistics.Add(Record(Outcome::kCompleted, {kText, kText, kText, "[DONE]"}));
  statistics.Add(Record(Outcome::kCompleted, {R"({"choices":[{"text":"x","token_ids":[1,2]}]})", "[DONE]"}));
  RequestRecord recorded = Record(Outcome::kCompleted, {kText, "[DONE]"});
  recorded.prompt_tokens_asked.reset();
  statistics.Add(recorded);
  EXPECT_EQ(statistics.prompt.tokens, 14);
  EXPECT_EQ(statistics.prompt.requests,
            (std::map<CountedBy, int64_t>{{CountedBy::kRequest, 2}, {CountedBy::kUnknown, 1}}));
  EXPECT_EQ(statistics.output.tokens, 6);
  EXPECT_EQ(statistics.output.requests,
            (std::map<CountedBy, int64_t>{{CountedBy::kEvents, 2}, {CountedBy::kTokenIds, 1}}));
  EXPECT_EQ(statistics.per_output_token_ms.size(), 1u);  // the others came in one event
}

TEST(RunStatistics, FailedAndInterruptedOnesAddNoTokensAndNoLatency) {
  RunStatistics statistics;
  RequestRecord record = Record(Outcome::kFailed, {kText, kText});
  record.error_kind = "timeout";
  record.error_text = "first";
  statistics.Add(record);
  record.error_text = "second";
  statistics.Add(record);
  statistics.Add(Record(Outcome::kInterrupted, {kText}));
  EXPECT_EQ(statistics.failed, 2);
  EXPECT_EQ(statistics.interrupted, 1);
  EXPECT_EQ(statistics.completed, 0);
  ASSERT_EQ(statistics.errors.size(), 1u);
  EXPECT_EQ(statistics.errors["timeout"].count, 2);
  EXPECT_EQ(statistics.errors["timeout"].example, "first");
  EXPECT_EQ(statistics.output.tokens + statistics.prompt.tokens, 0);
  EXPECT_TRUE(statistics.total_ms.empty() && statistics.first_token_ms.empty() && statistics.gap_ms.empty());
}

TEST(RunStatistics, AnAnswerWithoutOutputHasNoFirstToken) {
  RunStatistics statistics;
  statistics.Add(
      Record(Outcome::kCompleted, {R"({"choices":[],"usage":{"completion_tokens":1}})", "[DONE]"}));
  EXPECT_EQ(statistics.without_output, 1);
  EXPECT_TRUE(statistics.first_token_ms.empty());
  EXPECT_EQ(statistics.total_ms.size(), 1u);
}

}  // namespace
}  // namespace minke::cli::bench
