#include "services/attention/scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "gtest/gtest.h"

namespace minke::attention {
namespace {

std::unique_ptr<Sequence> MakeSequence(uint64_t id, int64_t prompt,
                                       absl::Time until = absl::InfiniteFuture()) {
  Request request;
  request.key = {1, id, 0};
  request.prompt.assign(prompt, 7);
  request.sampling.max_tokens = 1000;
  request.waiting_until = until;
  return std::make_unique<Sequence>(std::move(request));
}

struct Fixture {
  explicit Fixture(int64_t pages, SchedulerLimits limits = {}) : pool(pages), scheduler(limits, pool) {}
  std::vector<StepChunk> Plan() {
    return scheduler.PlanStep(absl::Now(), [&](const Sequence& s, const absl::Status& error) {
      (absl::IsDeadlineExceeded(error) ? late : refused).push_back(s.request.key.request);
    });
  }
  // What the engine does with a step: everything computed, one token sampled where a prompt ended.
  void Apply(const std::vector<StepChunk>& chunks) {
    for (const StepChunk& chunk : chunks) {
      chunk.sequence->computed = chunk.begin + chunk.count;
      scheduler.Publish(*chunk.sequence);
      if (chunk.sequence->computed == std::ssize(chunk.sequence->tokens)) chunk.sequence->tokens.push_back(1);
    }
  }
  PagePool pool;
  Scheduler scheduler;
  std::vector<uint64_t> refused, late;
};

TEST(Scheduler, FullQueueRefuses) {
  Fixture f(10, {.waiting_max = 2});
  EXPECT_TRUE(f.scheduler.Add(MakeSequence(1, 5)).ok());
  EXPECT_TRUE(f.scheduler.Add(MakeSequence(2, 5)).ok());
  EXPECT_EQ(f.scheduler.Add(MakeSequence(3, 5)).code(), absl::StatusCode::kResourceExhausted);
}

TEST(Scheduler, PromptLargerThanTheCacheIsRefused) {
  Fixture f(2);
  EXPECT_EQ(f.scheduler.Add(MakeSequence(1, 129)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(f.scheduler.Add(MakeSequence(2, 128)).ok());
  EXPECT_EQ(f.Plan().size(), 1u);  // fits exactly, alone
}

TEST(Scheduler, ADeadlineEndsWhatRunsAndWhatWaits) {
  Fixture f(10, {.sequences_max = 1});
  const auto add = [&](uint64_t id, absl::Time deadline) {
    auto sequence = MakeSequence(id, 100);
    sequence->request.deadline = deadline;
    ASSERT_TRUE(f.scheduler.Add(std::move(sequence)).ok());
  };
  const absl::Time soon = absl::Now() + absl::Milliseconds(100);
  add(1, soon);
  add(2, soon);
  add(3, absl::InfiniteFuture());
  f.Apply(f.Plan());
  EXPECT_EQ(f.scheduler.running(), 1);
  EXPECT_TRUE(f.late.empty());
  absl::SleepFor(soon - absl::Now() + absl::Milliseconds(1));
  const auto chunks = f.Plan();
  EXPECT_EQ(f.late, (std::vector<uint64_t>{1, 2}));
  EXPECT_TRUE(f.refused.empty());
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0].sequence->request.key.request, 3u);
  f.scheduler.Cancel({1, 3, 0});
  f.Plan();
  EXPECT_EQ(f.pool.available(), 10);
}

TEST(Scheduler, WaitingEndsAtItsTime) {
  Fixture f(10, {.sequences_max = 1});
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(1, 5)).ok());
  f.Apply(f.Plan());
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(2, 5, absl::InfinitePast())).ok());
  f.Plan();
  EXPECT_EQ(f.refused, std::vector<uint64_t>{2});
  EXPECT_EQ(f.scheduler.waiting(), 0);
}

TEST(Scheduler, PromptsAreCutToTheTokenBudgetAndDecodeGoesFirst) {
  Fixture f(100, {.step_tokens_max = 50});
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(1, 10)).ok());
  f.Apply(f.Plan());
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(2, 120)).ok());
  auto chunks = f.Plan();
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[0].count, 1);
  EXPECT_EQ(chunks[1].count, 49);
  f.Apply(chunks);
  chunks = f.Plan();
  EXPECT_EQ(chunks[1].begin, 49);
  EXPECT_EQ(chunks[1].count, 49);
}

TEST(Scheduler, CancelledSequencesAreGoneAtTheNextStep) {
  Fixture f(10);
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(1, 5)).ok());
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(2, 5)).ok());
  f.Apply(f.Plan());
  f.scheduler.Cancel({1, 1, 0});
  f.scheduler.Cancel({1, 99, 0});
  EXPECT_EQ(f.Plan().size(), 1u);
  f.scheduler.CancelSession(1);
  EXPECT_TRUE(f.Plan().empty());
  EXPECT_EQ(f.pool.used(), 0);
  EXPECT_FALSE(f.scheduler.HasWork());
}

TEST(Scheduler, YoungestIsPreemptedAndComesBackFirst) {
  Fixture f(3);
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(1, 60)).ok());
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(2, 60)).ok());
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(3, 60)).ok());
  int64_t steps = 0;
  while (f.scheduler.preemptions() == 0 && ++steps < 50) f.Apply(f.Plan());
  EXPECT_GT(f.scheduler.preemptions(), 0u);
  EXPECT_GE(f.scheduler.waiting(), 1);
  EXPECT_GE(f.scheduler.running(), 1);
}

// A machine on which a step of decoding takes 40 ms and a prompt row adds 2 ms.
struct SlowMachine : Fixture {
  using Fixture::Fixture;
  absl::Duration Step() {
    const auto chunks = Plan();
    int64_t decode_rows = 0, prompt_rows = 0;
    for (const StepChunk& chunk : chunks) (chunk.count == 1 ? decode_rows : prompt_rows) += chunk.count;
    const absl::Duration took =
        absl::Milliseconds((decode_rows > 0 ? 40 : 0) + 2 * static_cast<int64_t>(prompt_rows));
    scheduler.StepTook(took, decode_rows, prompt_rows);
    Apply(chunks);
    return took;
  }
};

TEST(Scheduler, ALonePromptAtMostDoublesTheStepsOfThoseThatDecode) {
  for (const double stretch : {2.0, 1.5, 0.0}) {
    SlowMachine f(1000, {.decode_stretch = stretch, .reuse_prefixes = false});
    for (uint64_t id = 1; id <= 8; ++id) ASSERT_TRUE(f.scheduler.Add(MakeSequence(id, 10)).ok());
    for (int i = 0; i < 5; ++i) f.Step();
    auto prompt = MakeSequence(9, 2000);
    const Sequence& watched = *prompt;
    ASSERT_TRUE(f.scheduler.Add(std::move(prompt)).ok());
    absl::Duration longest;
    int steps = 0;
    for (; watched.generated_size() == 0; ++steps) {
      ASSERT_LT(steps, 300);
      longest = std::max(longest, f.Step());
    }
    if (stretch == 0) {
      EXPECT_EQ(steps, 4);  // as fast as it can
    } else {
      EXPECT_LE(longest, absl::Milliseconds(40 * stretch + 2));
      EXPECT_LE(steps, 2000 / (20 * (stretch - 1)) + 5);  // and no slower than it may, but for what it learns
    }
  }
}

TEST(Scheduler, ACrowdOfPromptsGoesBeforeAFewThatDecode) {
  SlowMachine f(1000, {.reuse_prefixes = false});
  for (uint64_t id = 1; id <= 2; ++id) ASSERT_TRUE(f.scheduler.Add(MakeSequence(id, 10)).ok());
  for (int i = 0; i < 5; ++i) f.Step();
  for (uint64_t id = 3; id <= 12; ++id) ASSERT_TRUE(f.scheduler.Add(MakeSequence(id, 300)).ok());
  EXPECT_GT(f.Step(), absl::Milliseconds(1000));  // 10 wait, 2 decode: all the rows there are
}

// As measured: what a step costs grows with the root of its decoding rows, and a few prompt rows touch most
// experts already. Nobody's first token may wait until the others are done.
TEST(Scheduler, TheLastOfACrowdIsNotForgottenBesideThoseThatDecode) {
  const auto last_first_token = [](double stretch) {
    SlowMachine f(1000, {.decode_stretch = stretch, .reuse_prefixes = false});
    const auto step = [&] {
      const std::vector<StepChunk> chunks = f.Plan();
      int decode_rows = 0, prompt_rows = 0;
      for (const StepChunk& chunk : chunks) (chunk.count == 1 ? decode_rows : prompt_rows) += chunk.count;
      const absl::Duration took = absl::Milliseconds((decode_rows > 0 ? 25 * std::sqrt(decode_rows) : 0) +
                                                     (prompt_rows > 0 ? 60 + 1.5 * prompt_rows : 0));
      f.scheduler.StepTook(took, decode_rows, prompt_rows);
      f.Apply(chunks);
      return took;
    };
    // Two decode alone first: what was learned from them does not hold for many.
    for (uint64_t id = 1; id <= 2; ++id) EXPECT_TRUE(f.scheduler.Add(MakeSequence(id, 10)).ok());
    for (int i = 0; i < 5; ++i) step();
    std::vector<const Sequence*> crowd;
    for (uint64_t id = 3; id <= 32; ++id) {
      auto sequence = MakeSequence(id, 128);
      crowd.push_back(sequence.get());
      EXPECT_TRUE(f.scheduler.Add(std::move(sequence)).ok());
    }
    absl::Duration time;
    const auto waits = [](const Sequence* s) { return s->generated_size() == 0; };
    for (int steps = 0; std::any_of(crowd.begin(), crowd.end(), waits); ++steps) {
      if (steps == 1000) return absl::InfiniteDuration();
      time += step();
    }
    return time;
  };
  EXPECT_LE(last_first_token(2), 2.5 * last_first_token(0));  // forgotten: 4.5
}

TEST(Scheduler, RepeatedPromptCostsItsLastPageOnly) {
  Fixture f(100, {.step_tokens_max = 4096});
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(1, 2000)).ok());
  auto chunks = f.Plan();
  ASSERT_EQ(chunks.at(0).count, 2000);
  f.Apply(chunks);
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(2, 2000)).ok());  // while the first is running
  chunks = f.Plan();
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[1].begin, 1984);
  EXPECT_EQ(chunks[1].count, 16);
  EXPECT_EQ(chunks[1].sequence->cached_tokens, 1984);
  f.Apply(chunks);
  f.scheduler.CancelSession(1);
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(3, 64)).ok());  // whole pages, but one token must be computed
  ASSERT_TRUE(f.scheduler.Add(MakeSequence(4, 65)).ok());
  chunks = f.Plan();
  EXPECT_EQ(chunks.at(0).begin, 0);
  EXPECT_EQ(chunks.at(1).begin, 64);
}

TEST(Scheduler, PromptScoresAndSwitchedOffReuseComputeEveryRow) {
  for (const bool scores : {false, true}) {
    Fixture f(100, {.step_tokens_max = 4096, .reuse_prefixes = scores});
    for (const uint64_t id : {1, 2}) {
      auto sequence = MakeSequence(id, 200);
      sequence->request.sampling.want_prompt_logprobs = scores;
      ASSERT_TRUE(f.scheduler.Add(std::move(sequence)).ok());
      const auto chunks = f.Plan();
      EXPECT_EQ(chunks.back().count, 200);
      EXPECT_EQ(chunks.back().sequence->cached_tokens, 0);
      f.Apply(chunks);
    }
  }
}

// Against a trivial model: whatever comes, no page is leaked or shared, every chunk has its pages, someone
// moves on, and all sequences end.
TEST(Scheduler, RandomTrafficNeverLeaksAPageNorStandsStill) {
  uint64_t reused = 0;
  for (int seed = 0; seed < 30; ++seed) {
    std::mt19937 rng(seed);
    const int64_t pages = 4 + rng() % 12;
    Fixture f(pages, {.step_tokens_max = 1 + static_cast<int64_t>(rng() % 200),
                      .sequences_max = 1 + static_cast<int64_t>(rng() % 8)});
    uint64_t next_id = 1;
    std::map<uint64_t, int64_t> target;  // length at which a sequence ends
    int finished = 0, added = 0;
    for (int step = 0; step < 5000 && (added < 60 || f.scheduler.HasWork()); ++step) {
      if (added < 60 && rng() % 3 == 0) {
        const int64_t prompt = 1 + rng() % (pages * 32);
        target[next_id] = std::min<int64_t>(prompt + 1 + rng() % 80, pages * 64);
        ASSERT_TRUE(f.scheduler.Add(MakeSequence(next_id, prompt)).ok());
        ++next_id;
        ++added;
      }
      if (rng() % 40 == 0) f.scheduler.Cancel({1, 1 + rng() % next_id, 0});
      const auto chunks = f.Plan();
      std::set<uint32_t> seen, written;
      for (const StepChunk& chunk : chunks) {
        ASSERT_GE(std::ssize(chunk.sequence->pages), PagesFor(chunk.begin + chunk.count));
        ASSERT_EQ(chunk.begin, chunk.sequence->computed);
        // Pages that are written to have one owner; those before may be shared.
        for (size_t i = chunk.begin / 64; i < chunk.sequence->pages.size(); ++i)
          ASSERT_TRUE(written.insert(chunk.sequence->pages[i]).second) << "a page has two owners";
        for (int64_t i = 0; i < chunk.begin / 64; ++i) seen.insert(chunk.sequence->pages[i]);
      }
      for (const uint32_t page : written)
        ASSERT_TRUE(seen.insert(page).second) << "a shared page is written to";
      ASSERT_LE(std::ssize(seen), f.pool.used());
      f.Apply(chunks);
      for (const StepChunk& chunk : chunks) {
        if (std::ssize(chunk.sequence->tokens) >= target[chunk.sequence->request.key.request]) {
          f.scheduler.Finish(chunk.sequence);
          ++finished;
        }
      }
    }
    EXPECT_FALSE(f.scheduler.HasWork()) << "seed " << seed << ": stands still";
    EXPECT_EQ(f.pool.used(), 0) << "seed " << seed;
    EXPECT_GT(finished, 20);
    reused += f.scheduler.reuse_hits();
  }
  EXPECT_GT(reused, 0u);
}

}  // namespace
}  // namespace minke::attention
