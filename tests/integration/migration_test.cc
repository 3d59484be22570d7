// A sequence that changes its attention node in the middle, through the gateway's pool and by pages that move
// from node to node: same tokens and same bits as undisturbed, and the prefix is not computed again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <thread>

#include "absl/time/clock.h"
#include "services/gateway/attention_client/attention_pool.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using gateway::AttentionNode;
using gateway::AttentionPool;
using testing_support::ClusterOptions;
using testing_support::Golden;
using testing_support::LocalCluster;

constexpr int64_t kPageTokens = kernels::kPageTokens;
// Long enough to be far from its end when a loaded machine gets round to moving it.
constexpr uint32_t kPrompt = 700, kNew = 900;

struct Text {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs;
  uint32_t cached = 0;
  friend bool operator==(const Text&, const Text&) = default;
};

class Sink final : public gateway::SequenceSink {
 public:
  void OnEvent(gateway::SequenceEvent event) override {
    const std::lock_guard lock(mutex_);
    text_.tokens.insert(text_.tokens.end(), event.token_ids.begin(), event.token_ids.end());
    for (const auto& logprob : event.logprobs) text_.logprobs.push_back(logprob.logprob);
    text_.cached += event.cached_prompt_tokens;
    if (event.finish == gateway::FinishReason::kNone) return;
    EXPECT_TRUE(event.error.ok()) << event.error;
    finished_ = true;
  }
  Text text() const {
    const std::lock_guard lock(mutex_);
    return text_;
  }
  int64_t size() const { return std::ssize(text().tokens); }
  bool finished() const {
    const std::lock_guard lock(mutex_);
    return finished_;
  }

 private:
  mutable std::mutex mutex_;
  Text text_;
  bool finished_ = false;
};

bool Eventually(const std::function<bool()>& holds) {
  for (const absl::Time limit = absl::Now() + absl::Seconds(60); absl::Now() < limit;) {
    if (holds()) return true;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return false;
}

// Two attention nodes behind a gateway's pool, which is told what the cluster's view says of them.
class Served {
 public:
  explicit Served(ClusterOptions options) : local(std::move(options)) {
    watch_ = std::thread([this] {
      while (!stop_.load()) {
        std::vector<AttentionNode> nodes;
        const cluster::v1::ClusterView view = local.view();
        for (const cluster::v1::Member& member : view.members()) {
          if (member.role() != cluster::v1::ROLE_ATTENTION) continue;
          nodes.push_back({member.node_id(), member.rpc_address(), member.ready(), member.draining()});
        }
        pool.UpdateNodes(nodes);
        absl::SleepFor(absl::Milliseconds(5));
      }
    });
  }
  ~Served() {
    stop_.store(true);
    watch_.join();
  }

  std::shared_ptr<Sink> Start(uint32_t seed = 5) {
    gateway::SequenceSpec spec;
    std::vector<uint32_t> prompt(kPrompt);
    for (uint32_t i = 0; i < kPrompt; ++i) prompt[i] = (i * i * 7 + i * 13 + seed) % 500;
    spec.prompt = std::make_shared<const std::vector<uint32_t>>(std::move(prompt));
    spec.sampling.seed = seed;
    spec.sampling.max_tokens = kNew;
    spec.sampling.logprobs = 0;
    spec.sampling.frequency_penalty = 0.3f;
    auto sink = std::make_shared<Sink>();
    pool.Start(std::move(spec), sink);
    return sink;
  }
  // Which node computes.
  int Busy() {
    for (int i = 0; i < 2; ++i) {
      if (local.engine(i).status().running > 0) return i;
    }
    return -1;
  }

  // Once the stream has so many tokens: the node that computes it drains and ends, and the stream goes on to
  // its end. The node's index; -1: there was none.
  int DrainUnder(const Sink& sink, int64_t tokens) {
    EXPECT_TRUE(Eventually([&] { return sink.size() >= tokens; }));
    const int old = Busy();
    if (old < 0) return old;
    EXPECT_TRUE(local.attention(old).Drain(absl::Seconds(30), [] { return false; }).ok());
    local.StopAttention(old);
    EXPECT_TRUE(Eventually([&] { return sink.finished(); }));
    return old;
  }

  LocalCluster local;
  gateway::GatewayCounters counters;
  // No false alarms on a loaded machine: this is about nodes that drain.
  AttentionPool pool{{.heartbeat = std::chrono::seconds(5)}, &counters, [](bool) {}};

 private:
  std::atomic<bool> stop_{false};
  std::thread watch_;
};

ClusterOptions Options(const char* shape) {
  return {.checkpoint = Golden::Get(shape).checkpoint, .attentions = 2, .threads = 1};
}

Text Undisturbed(ClusterOptions options) {
  options.attentions = 1;
  Served served(std::move(options));
  const auto sink = served.Start();
  EXPECT_TRUE(Eventually([&] { return sink->finished(); }));
  EXPECT_EQ(sink->size(), kNew);
  return sink->text();
}

class Migration : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Shapes, Migration, testing::Values("v2", "lite", "plain"),
                         [](const auto& info) { return info.param; });

TEST_P(Migration, DrainingNodeHandsPagesOverAndLeaves) {
  for (const int ranks : {1, 2}) {
    if (ranks == 2 && std::string(GetParam()) == "lite") continue;  // it has three heads
    ClusterOptions options = Options(GetParam());
    options.tensor_parallel = ranks;
    const Text want = Undisturbed(options);
    Served served(options);
    const auto sink = served.Start();
    ASSERT_TRUE(Eventually([&] { return sink->size() >= 70; }));
    const int old = served.Busy();
    ASSERT_GE(old, 0);
    const int64_t seen = kPrompt + sink->size();
    const absl::Status drained = served.local.attention(old).Drain(absl::Seconds(30), [] { return false; });
    EXPECT_TRUE(drained.ok()) << drained;
    const attention::EngineStatus given = served.local.engine(old).status();
    served.local.StopAttention(old);
    ASSERT_TRUE(Eventually([&] { return sink->finished(); }));
    EXPECT_EQ(sink->text(), want);
    const attention::EngineStatus status = served.local.engine(1 - old).status();
    EXPECT_EQ(given.pages_given, status.pages_fetched);
    EXPECT_GE(status.pages_fetched, static_cast<uint64_t>((seen - 1) / kPageTokens));
    EXPECT_EQ(status.fetches_failed, 0u);
    EXPECT_EQ(status.bad_frames + given.bad_frames, 0u);
    // All rows of the sequence but its last token's, less the pages that came.
    EXPECT_EQ(status.computed_tokens, kPrompt + kNew - 1 - status.pages_fetched * kPageTokens);
    EXPECT_EQ(served.counters.migrations.load(), 1u);
    EXPECT_EQ(served.counters.resubmissions.load(), 0u);
  }
}

TEST_P(Migration, PagesMoveOverUcx) {
  ClusterOptions options = Options(GetParam());
  options.ucx = true;
  const Text want = Undisturbed(options);
  Served served(options);
  const auto sink = served.Start();
  const int old = served.DrainUnder(*sink, 3);
  ASSERT_GE(old, 0);
  EXPECT_EQ(sink->text(), want);
  EXPECT_GE(served.local.engine(1 - old).status().pages_fetched, kPrompt / kPageTokens);
}

// The node that gives dies after a few pages: what has come is used, the rest computed.
TEST_P(Migration, GiverKilledInTheMiddle) {
  ClusterOptions options = Options(GetParam());
  const Text want = Undisturbed(options);
  options.page_exchange = {.window = 1};
  options.faults =
      transport::FaultOptions{.delay_probability = 1,
                              .delay_max = absl::Milliseconds(600),
                              .kinds = uint64_t{1} << static_cast<int>(wire::Kind::kPageTransfer)};
  Served served(options);
  const auto sink = served.Start();
  ASSERT_TRUE(Eventually([&] { return sink->size() >= 20; }));
  const int old = served.Busy();
  ASSERT_GE(old, 0);
  const absl::Status drained = served.local.attention(old).Drain(
      absl::Seconds(30), [&] { return served.local.engine(1 - old).status().pages_fetched >= 2; });
  EXPECT_TRUE(absl::IsCancelled(drained)) << drained;
  served.local.StopAttention(old);
  ASSERT_TRUE(Eventually([&] { return sink->finished(); }));
  EXPECT_EQ(sink->text(), want);
  const attention::EngineStatus status = served.local.engine(1 - old).status();
  EXPECT_GE(status.pages_fetched, 2u);
  EXPECT_LT(status.pages_fetched, kPrompt / kPageTokens);
  EXPECT_EQ(status.fetches_failed, 1u);
  EXPECT_EQ(status.computed_tokens, kPrompt + kNew - 1 - status.pages_fetched * kPageTokens);
}

// Pages that are lost on the way cost time, and never an answer.
TEST_P(Migration, LostPagesAreComputedAgain) {
  ClusterOptions options = Options(GetParam());
  const Text want = Undisturbed(options);
  options.page_exchange = {.fetch_stall = absl::Milliseconds(200)};
  options.faults =
      transport::FaultOptions{.drop_probability = 0.3,
                              .duplicate_probability = 0.3,
                              .reorder_probability = 0.5,
                              .kinds = (uint64_t{15} << static_cast<int>(wire::Kind::kPageRequest))};
  Served served(options);
  const auto sink = served.Start();
  ASSERT_GE(served.DrainUnder(*sink, 20), 0);
  EXPECT_EQ(sink->text(), want);
}

TEST(MigrationOfMany, NodesThatDrainOneAfterTheOther) {
  ClusterOptions options = Options("v2");
  std::vector<Text> want;
  {
    Served served(options);
    std::vector<std::shared_ptr<Sink>> sinks;
    for (uint32_t i = 0; i < 6; ++i) sinks.push_back(served.Start(i));
    for (const auto& sink : sinks) {
      ASSERT_TRUE(Eventually([&] { return sink->finished(); }));
      want.push_back(sink->text());
    }
  }
  Served served(options);
  std::vector<std::shared_ptr<Sink>> sinks;
  for (uint32_t i = 0; i < 6; ++i) sinks.push_back(served.Start(i));
  for (const auto& sink : sinks) ASSERT_TRUE(Eventually([&] { return sink->size() >= 3; }));
  EXPECT_TRUE(served.local.attention(0).Drain(absl::Seconds(30), [] { return false; }).ok());
  served.local.StopAttention(0);
  // The last one: nothing can leave it.
  EXPECT_TRUE(served.local.attention(1).Drain(absl::Seconds(60), [] { return false; }).ok());
  for (size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_TRUE(sinks[i]->finished());
    EXPECT_EQ(sinks[i]->text(), want[i]) << i;
  }
}

}  // namespace
}  // namespace minke
