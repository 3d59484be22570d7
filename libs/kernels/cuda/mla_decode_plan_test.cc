#include "libs/kernels/cuda/mla_decode_plan.h"

#include <algorithm>
#include <map>
#include <random>

#include "gtest/gtest.h"

namespace minke::cuda {
namespace {

MlaDecodePlanLimits Limits(int heads, int item_rows, int workers) {
  MlaDecodePlanLimits limits;
  limits.heads = heads;
  limits.item_rows = item_rows;
  limits.workers = workers;
  return limits;
}

TEST(MlaDecodePlan, RejectsSequencesThatCannotBe) {
  for (const DecodeSequence bad : {DecodeSequence{0, 1}, {5, 0}, {5, 5}, {2, 3}, {-1, 1}}) {
    EXPECT_EQ(PlanMlaDecode(std::span(&bad, 1), Limits(16, 64, 4)).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(MlaDecodePlan, EmptyBatchHasNoSegments) {
  const auto plan = PlanMlaDecode({}, Limits(16, 64, 4));
  ASSERT_TRUE(plan.ok());
  EXPECT_TRUE(plan->segments.empty());
  EXPECT_EQ(plan->worker_begin, std::vector<int32_t>(5, 0));
}

// Whatever the mix of lengths: every page of every item once and in order, no worker above the payload,
// partial results of an item side by side, at most two per worker.
TEST(MlaDecodePlan, CoversEveryPageOnceForAnyMixOfLengths) {
  std::mt19937 rng(3);
  for (int round = 0; round < 200; ++round) {
    const int heads = 16 << rng() % 4, item_rows = round % 3 == 0 ? 16 : round % 3 == 1 ? 64 : 128;
    const MlaDecodePlanLimits limits = Limits(heads, item_rows, 1 + rng() % 140);
    std::vector<DecodeSequence> sequences(1 + rng() % 200);
    for (auto& s : sequences) {
      s.queries = 1 + rng() % 4;
      s.length = s.queries + (rng() % 8 == 0 ? rng() % 30000 : rng() % 300);
    }
    const auto plan = PlanMlaDecode(sequences, limits);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ASSERT_EQ(std::ssize(plan->worker_begin), limits.workers + 1);
    EXPECT_EQ(plan->worker_begin.back(), std::ssize(plan->segments));
    for (int w = 0; w < limits.workers; ++w) {
      int64_t cost = 0;
      for (int i = plan->worker_begin[w]; i < plan->worker_begin[w + 1]; ++i) {
        EXPECT_GT(plan->segments[i].pages, 0);
        cost += plan->segments[i].pages + limits.segment_cost;
      }
      EXPECT_LE(cost, plan->payload);
    }
    std::map<int, std::vector<DecodeSegment>> by_row;
    for (const auto& segment : plan->segments) by_row[segment.row].push_back(segment);
    int row = 0, token = 0, splits = 0;
    std::map<int, DecodeCombine> combines;
    for (const auto& combine : plan->combines) combines[combine.row] = combine;
    for (size_t s = 0; s < sequences.size(); ++s) {
      const int rows = sequences[s].queries * heads;
      EXPECT_EQ(row, token * heads);
      for (int offset = 0; offset < rows; offset += item_rows) {
        const auto& parts = by_row[row];
        ASSERT_FALSE(parts.empty());
        int page = 0;
        for (size_t i = 0; i < parts.size(); ++i) {
          EXPECT_EQ(parts[i].page_begin, page);
          EXPECT_EQ(parts[i].rows, std::min(item_rows, rows - offset));
          EXPECT_EQ(parts[i].row_offset, offset);
          EXPECT_EQ(parts[i].sequence, static_cast<int>(s));
          EXPECT_EQ(parts[i].first_limit, sequences[s].length - sequences[s].queries + 1);
          if (parts.size() == 1) {
            EXPECT_EQ(parts[i].split, -1);
          } else {
            EXPECT_EQ(parts[i].split, combines.at(row).split_begin + static_cast<int>(i));
          }
          page += parts[i].pages;
        }
        EXPECT_EQ(page, (sequences[s].length + 63) / 64);
        if (parts.size() > 1) {
          EXPECT_EQ(combines.at(row).splits, std::ssize(parts));
          EXPECT_EQ(combines.at(row).rows, parts[0].rows);
          splits += combines.at(row).splits;
        } else {
          EXPECT_FALSE(combines.contains(row));
        }
        row += parts[0].rows;
      }
      token += sequences[s].queries;
    }
    EXPECT_EQ(plan->tokens, token);
    EXPECT_EQ(plan->splits, splits);
    EXPECT_LE(plan->splits, 2 * limits.workers);
    EXPECT_LE(std::ssize(plan->combines), limits.workers);
  }
}

TEST(MlaDecodePlan, OneLongSequenceKeepsEveryWorkerBusy) {
  const DecodeSequence sequence = {132 * 64 * 10, 1};
  MlaDecodePlanLimits limits = Limits(16, 64, 132);
  const auto plan = PlanMlaDecode(std::span(&sequence, 1), limits);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(std::ssize(plan->segments), 132);
  EXPECT_EQ(plan->payload, 10 + limits.segment_cost);
}

// 128 equal sequences for 66 workers: two each is a little worse balanced than a cut line, and needs no
// combining.
TEST(MlaDecodePlan, WholeSequencesWhereTheyBalanceNearlyAsWell) {
  const std::vector<DecodeSequence> sequences(128, {4096, 1});
  const auto plan = PlanMlaDecode(sequences, Limits(128, 128, 66));
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->splits, 0);
  EXPECT_TRUE(plan->combines.empty());
  EXPECT_EQ(std::ssize(plan->segments), 128);
  EXPECT_EQ(plan->payload, 2 * (64 + 3));
}

TEST(MlaDecodePlan, CutsWhereWholeSequencesWouldNotBalance) {
  std::vector<DecodeSequence> sequences(67, {4096, 1});
  const auto plan = PlanMlaDecode(sequences, Limits(128, 128, 66));
  ASSERT_TRUE(plan.ok());
  EXPECT_GT(plan->splits, 0);
  EXPECT_LT(plan->payload, 2 * 64);
}

}  // namespace
}  // namespace minke::cuda
