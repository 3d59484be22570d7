#include "services/experts/compute/launch_plan.h"

#include <array>
#include <vector>

#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"

namespace minke::experts {
namespace {

// 160 experts in 8 groups of 20, 6 per row, from at most 3 groups.
const ModelConfig& Config() {
  static const ModelConfig config = minke::testing_support::TinyConfig();
  return config;
}

// A message whose rows have these (expert, weight) pairs.
struct Message {
  std::vector<wire::WorkRow> rows;
  std::vector<wire::WorkPair> pairs;
  explicit Message(const std::vector<std::vector<std::pair<uint16_t, float>>>& of_rows) {
    for (const auto& row : of_rows) {
      rows.push_back({.row = static_cast<uint32_t>(rows.size())});
      rows.back().set_pairs(static_cast<uint32_t>(pairs.size()), static_cast<uint32_t>(row.size()));
      for (const auto& [expert, weight] : row) pairs.push_back({.weight = weight, .expert = expert});
    }
  }
  LaunchJob job() const { return {.view = {.rows = rows, .pairs = pairs}}; }
};

std::vector<GroupRow> Split(std::span<const LaunchJob> jobs) {
  Units units;
  for (uint32_t g = 0; g < 8; ++g) units[{1, g}] = nullptr;
  std::vector<GroupRow> hosted, missing;
  for (uint32_t j = 0; j < jobs.size(); ++j)
    SplitByGroup(Config(), units, 1, j, jobs[j].view, hosted, missing);
  EXPECT_TRUE(missing.empty());
  return hosted;
}

TEST(LaunchSlots, AreTheMostPairsOfARowInAGroup) {
  EXPECT_EQ(LaunchSlots(Config()), 6);
  ModelConfig small = Config();
  small.n_routed_experts = 18;  // groups of 2 and 3
  EXPECT_EQ(LaunchSlots(small), 3);
}

TEST(LayOut, PartsAreAlignedAndDoNotOverlap) {
  const UploadLayout up =
      LayOutUpload(/*rows=*/3, /*outputs=*/5, /*slots=*/6, /*hidden=*/64, /*targets=*/true);
  EXPECT_EQ(up.source, 0);
  for (const int64_t part : {up.experts, up.weights, up.targets, up.rows}) EXPECT_EQ(part % 256, 0);
  EXPECT_GE(up.experts - up.source, 5 * 4);
  EXPECT_GE(up.weights - up.experts, 5 * 6 * 4);
  EXPECT_GE(up.targets - up.weights, 5 * 6 * 4);
  EXPECT_GE(up.rows - up.targets, 5 * 4);
  EXPECT_EQ(up.bytes - up.rows, 3 * 64 * 2);
  const UploadLayout without = LayOutUpload(3, 5, 6, 64, /*targets=*/false);
  EXPECT_EQ(without.rows, without.targets);
  const DownloadLayout down = LayOutDownload(/*sums=*/5, /*outputs=*/5, /*hidden=*/64);
  EXPECT_GE(down.finite - down.partials, 5 * 64 * 2);
  EXPECT_EQ(down.bytes - down.finite, 5);
  EXPECT_EQ(LayOutDownload(/*sums=*/0, /*outputs=*/5, /*hidden=*/64).bytes, 5);
}

TEST(LaunchPlan, NothingIsNoRun) {
  LaunchPlan plan(Config());
  plan.Make({});
  EXPECT_TRUE(plan.rows().empty());
  EXPECT_TRUE(plan.runs().empty());
  EXPECT_TRUE(plan.group_row_of().empty());
}

TEST(LaunchPlan, RowsOfSeveralMessagesAreSentOnceAndUnitsLieTogether) {
  const Message first({{{1, .5f}, {19, .25f}, {45, 2.f}}, {{20, 1.f}}});
  const Message second({{{0, 3.f}, {41, 4.f}, {59, 5.f}, {159, 6.f}}});
  const LaunchJob jobs[] = {first.job(), second.job()};
  const std::vector<GroupRow> rows = Split(jobs);
  ASSERT_EQ(rows.size(), 6u);
  LaunchPlan plan(Config());
  plan.Make({});
  plan.Make(rows);  // again: nothing is left of the one before

  ASSERT_EQ(plan.rows().size(), 3u);  // 6 group rows of 3 rows
  EXPECT_EQ(plan.rows()[1].job, 0u);
  EXPECT_EQ(plan.rows()[1].row, 1u);
  EXPECT_EQ(plan.rows()[2].job, 1u);
  EXPECT_EQ(plan.rows()[2].row, 0u);
  ASSERT_EQ(plan.runs().size(), 4u);
  const std::vector<std::array<int, 3>> want_runs = {{0, 0, 2}, {1, 2, 3}, {2, 3, 5}, {7, 5, 6}};
  for (size_t i = 0; i < want_runs.size(); ++i) {
    EXPECT_EQ(plan.runs()[i].group, static_cast<uint32_t>(want_runs[i][0]));
    EXPECT_EQ(plan.runs()[i].begin, want_runs[i][1]);
    EXPECT_EQ(plan.runs()[i].end, want_runs[i][2]);
  }

  const UploadLayout layout = LayOutUpload(3, 6, plan.slots(), Config().hidden_size, /*targets=*/false);
  std::vector<std::byte> block(layout.bytes, std::byte{0xff});
  plan.WriteTables(jobs, {}, layout, block.data());
  const auto* source = reinterpret_cast<const int32_t*>(block.data() + layout.source);
  const auto* experts = reinterpret_cast<const int32_t*>(block.data() + layout.experts);
  const auto* weights = reinterpret_cast<const float*>(block.data() + layout.weights);
  struct Output {
    int source;
    std::vector<int32_t> experts;  // by the unit's first
    std::vector<float> weights;
  };
  const std::vector<Output> want = {{0, {1, 19}, {.5f, .25f}}, {2, {0}, {3.f}},          {1, {0}, {1.f}},
                                    {0, {5}, {2.f}},           {2, {1, 19}, {4.f, 5.f}}, {2, {19}, {6.f}}};
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(source[i], want[i].source) << i;
    for (size_t k = 0; k < 6; ++k) {
      const bool pair = k < want[i].experts.size();
      EXPECT_EQ(experts[i * 6 + k], pair ? want[i].experts[k] : -1) << i << ", " << k;
      EXPECT_EQ(weights[i * 6 + k], pair ? want[i].weights[k] : 0) << i << ", " << k;
    }
    const GroupRow& row = rows[plan.group_row_of()[i]];
    EXPECT_EQ(plan.rows()[source[i]].job, row.job);
    EXPECT_EQ(plan.rows()[source[i]].row, row.row);
  }
  // Rows are not the plan's to write.
  EXPECT_EQ(block[layout.rows], std::byte{0xff});

  // Where rows lie elsewhere, sources are called as they are there.
  plan.WriteTables(jobs, std::vector<int32_t>{700, 5, 42}, layout, block.data());
  const int numbers[] = {700, 5, 42};
  for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(source[i], numbers[want[i].source]) << i;
}

TEST(LaunchPlan, RowsOfTheSameNumberInTwoMessagesAreTwo) {
  const Message first({{{5, 1.f}}}), second({{{5, 1.f}}});
  const LaunchJob jobs[] = {first.job(), second.job()};
  const std::vector<GroupRow> rows = Split(jobs);
  LaunchPlan plan(Config());
  plan.Make(rows);
  EXPECT_EQ(plan.rows().size(), 2u);
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].end, 2);
}

}  // namespace
}  // namespace minke::experts
