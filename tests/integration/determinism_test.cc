// Exact mode: a row's result is a pure function of its token prefix. The same request must give the same bits
// on any placement, in any batch, by any chunking, over any transport, and after anything that was lost on
// the way.
#include <random>

#include "gtest/gtest.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

constexpr uint32_t kNewTokens = 12;

// Bits of everything a caller can see.
struct Bits {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs, prompt_logprobs;
  friend bool operator==(const Bits&, const Bits&) = default;
};
Bits BitsOf(const Generation& g) {
  EXPECT_TRUE(g.error.ok()) << g.error;
  return {g.tokens, g.logprobs, g.prompt_logprobs};
}

class Determinism : public testing::TestWithParam<const char*> {
 protected:
  static ClusterOptions Options(const char* name) { return {.checkpoint = Golden::Get(name).checkpoint}; }
  static Bits Run(ClusterOptions options) {
    LocalCluster cluster(std::move(options));
    return BitsOf(cluster.Run(Request()));
  }
  static inference::v1::Submit Request() {
    return Greedy(Golden::Get(GetParam()).input_ids, kNewTokens, true);
  }
};
INSTANTIATE_TEST_SUITE_P(Shapes, Determinism, testing::Values("v2", "lite", "plain"),
                         [](const auto& info) { return info.param; });

TEST_P(Determinism, SameBitsOnAnyPlacementRoutingTransportAndMicrobatching) {
  const Bits want = Run(Options(GetParam()));
  ASSERT_EQ(want.tokens.size(), kNewTokens);
  for (const int experts : {1, 2, 4, 8}) {
    for (const bool local : {false, true}) {
      for (const int microbatches : {1, 2}) {
        ClusterOptions options = Options(GetParam());
        options.experts = experts;
        options.local_routing = local;
        options.microbatches = microbatches;
        options.threads = 1 + experts % 2;
        EXPECT_EQ(Run(options), want)
            << experts << " servers, local routing " << local << ", microbatches " << microbatches;
      }
    }
  }
  for (const bool local : {false, true}) {
    ClusterOptions options = Options(GetParam());
    options.ucx = true;
    options.experts = 3;
    options.replicas = 2;
    options.local_routing = local;
    EXPECT_EQ(Run(options), want) << "over UCX, local routing " << local;
  }
}

TEST_P(Determinism, SameBitsInChunksOfAnySize) {
  const Bits want = Run(Options(GetParam()));
  for (const int64_t chunk : {1, 7, 64}) {
    ClusterOptions options = Options(GetParam());
    options.step_tokens_max = chunk;
    EXPECT_EQ(Run(options), want) << "chunks of " << chunk;
  }
  ClusterOptions naive = Options(GetParam());
  naive.mla = attention::MlaChoice::kNaive;
  const Bits naive_bits = Run(naive);
  naive.step_tokens_max = 7;
  EXPECT_EQ(Run(naive), naive_bits) << "naive form, chunks of 7";
}

TEST_P(Determinism, SameBitsInsideABatchOfSixteen) {
  const Bits want = Run(Options(GetParam()));
  for (const int microbatches : {1, 2}) {
    ClusterOptions options = Options(GetParam());
    options.microbatches = microbatches;
    options.step_tokens_max = 100;
    LocalCluster cluster(options);
    std::mt19937 rng(3);
    std::vector<inference::v1::Submit> requests;
    for (int i = 0; i < 16; ++i) {
      std::vector<uint32_t> prompt(1 + rng() % 150);
      for (uint32_t& id : prompt) id = 2 + rng() % 500;
      requests.push_back(i == 5 ? Request() : Greedy(prompt, 1 + rng() % 20, i % 2 == 0));
    }
    const std::vector<Generation> results = cluster.Run(requests);
    EXPECT_EQ(BitsOf(results[5]), want);
    for (const Generation& result : results) EXPECT_TRUE(result.error.ok()) << result.error;
    EXPECT_EQ(cluster.engine().status().pages_used, 0);
  }
}

TEST_P(Determinism, SameBitsWhenPagesRunOutAndSequencesAreRecomputed) {
  const Golden& golden = Golden::Get(GetParam());
  const std::vector<uint32_t> prompt(golden.input_ids.begin(), golden.input_ids.begin() + 100);
  ClusterOptions options = Options(GetParam());
  Bits want;
  {
    LocalCluster cluster(options);
    want = BitsOf(cluster.Run(Greedy(prompt, 60, true)));
  }
  // Room for five pages of 64 tokens: three sequences of 160 tokens need nine.
  const ModelConfig config = ModelConfig::Load(golden.checkpoint).value();
  options.cache_bytes = 5 * 64 * int64_t{config.num_hidden_layers} * config.latent_dim() * 4;
  LocalCluster cluster(options);
  const std::vector<Generation> results =
      cluster.Run(std::vector{Greedy(prompt, 60, true), Greedy(prompt, 60, true), Greedy(prompt, 60, true)});
  for (const Generation& result : results) EXPECT_EQ(BitsOf(result), want);
  EXPECT_GT(cluster.engine().status().preemptions, 0u);
  EXPECT_EQ(cluster.engine().status().pages_used, 0);
}

// Conversations that share their beginnings, over and over, in a cache that cannot hold them all: what was
// reused, evicted or computed anew must not show.
TEST_P(Determinism, SameBitsWithReusedPagesUnderEviction) {
  const Golden& golden = Golden::Get(GetParam());
  std::mt19937 rng(11);
  std::vector<inference::v1::Submit> requests;
  for (int i = 0; i < 24; ++i) {
    // One of three beginnings of 70 to 200 tokens, then something of its own.
    const uint32_t which = rng() % 3;
    std::vector<uint32_t> prompt(70 + 65 * which);
    for (size_t j = 0; j < prompt.size(); ++j) prompt[j] = 2 + (j * (7 + which)) % 500;
    for (int j = rng() % 40; j > 0; --j) prompt.push_back(2 + rng() % 500);
    requests.push_back(Greedy(prompt, 1 + rng() % 70, false));
    requests.back().mutable_sampling()->set_want_logprobs(true);
  }
  ClusterOptions options = Options(GetParam());
  options.reuse_prefixes = false;
  std::vector<Bits> want;
  {
    LocalCluster cluster(options);
    for (const Generation& g : cluster.Run(requests)) {
      EXPECT_EQ(g.cached_prompt_tokens, 0u);
      want.push_back(BitsOf(g));
    }
  }
  options.reuse_prefixes = true;
  const ModelConfig config = ModelConfig::Load(golden.checkpoint).value();
  for (const int pages : {6, 9, 200}) {
    options.cache_bytes = pages * 64 * int64_t{config.num_hidden_layers} * config.latent_dim() * 4;
    LocalCluster cluster(options);
    uint32_t reused = 0;
    for (int round = 0; round < 2; ++round) {
      const std::vector<Generation> results = cluster.Run(requests);
      for (size_t i = 0; i < results.size(); ++i) {
        EXPECT_EQ(BitsOf(results[i]), want[i]) << "request " << i << ", " << pages << " pages";
        reused += results[i].cached_prompt_tokens;
      }
    }
    const attention::EngineStatus status = cluster.engine().status();
    EXPECT_GT(reused, 0u) << pages;
    EXPECT_EQ(status.reuse_hits, reused);
    EXPECT_EQ(status.pages_used, 0);
    EXPECT_GT(status.pages_cached, 0);
    EXPECT_TRUE(pages > 6 || status.preemptions > 0);
  }
}

// Every kind of loss, over and over: frames dropped, repeated, delayed, reordered between all processes.
TEST_P(Determinism, SameBitsOverAFaultyTransport) {
  const Golden& golden = Golden::Get(GetParam());
  const std::vector<uint32_t> prompt(golden.input_ids.begin(), golden.input_ids.begin() + 40);
  Bits want;
  {
    LocalCluster cluster(Options(GetParam()));
    want = BitsOf(cluster.Run(Greedy(prompt, 8, true)));
  }
  for (const bool local : {false, true}) {
    for (const int microbatches : {1, 2}) {
      ClusterOptions options = Options(GetParam());
      options.local_routing = local;
      options.microbatches = microbatches;
      options.experts = 3;
      options.replicas = 2;
      options.step_tokens_max = 16;
      options.exchange.plan_timeout = absl::Milliseconds(15);
      options.exchange.result_timeout = absl::Milliseconds(25);
      options.faults = transport::FaultOptions{.seed = 7,
                                               .drop_probability = 0.05,
                                               .duplicate_probability = 0.1,
                                               .delay_probability = 0.1,
                                               .delay_max = absl::Milliseconds(8),
                                               .reorder_probability = 0.2};
      LocalCluster cluster(options);
      const std::vector<Generation> results =
          cluster.Run(std::vector{Greedy(prompt, 8, true), Greedy(prompt, 8, true), Greedy(prompt, 8, true)});
      for (const Generation& result : results)
        EXPECT_EQ(BitsOf(result), want) << "local " << local << " mb " << microbatches;
      const transport::FaultCounts faults = cluster.fault_counts();
      EXPECT_GT(faults.dropped, 0u);
      EXPECT_GT(faults.duplicated, 0u);
      EXPECT_GT(faults.reordered, 0u);
      EXPECT_EQ(cluster.engine().status().bad_frames, 0u);
      EXPECT_EQ(cluster.engine().status().pages_used, 0);
    }
  }
}

TEST(Failover, ReplicaAnswersForASlowServerWithTheSameBits) {
  const Golden& golden = Golden::Get("v2");
  ClusterOptions options{.checkpoint = golden.checkpoint};
  options.experts = 2;
  options.replicas = 2;
  const Bits want = BitsOf(LocalCluster(options).Run(Greedy(golden.input_ids, 40, true)));
  // One message in fifty of one server is late; nothing is ever lost.
  options.expert_faults =
      transport::FaultOptions{.seed = 3, .delay_probability = 0.02, .delay_max = absl::Seconds(2)};
  for (const double factor : {0.0, 1.0}) {
    options.exchange.hedge_factor = factor;
    LocalCluster cluster(options);
    const Generation result = cluster.Run(Greedy(golden.input_ids, 40, true));
    EXPECT_EQ(BitsOf(result), want);
    const attention::EngineStatus status = cluster.engine().status();
    EXPECT_EQ(status.hedged_rows > 0, factor > 0) << status.hedged_rows;
  }
}

TEST(Failover, ReplicaTakesOverWithTheSameBits) {
  const Golden& golden = Golden::Get("v2");
  ClusterOptions options{.checkpoint = golden.checkpoint};
  Bits want;
  {
    LocalCluster cluster(options);
    want = BitsOf(cluster.Run(Greedy(golden.input_ids, 40, true)));
  }
  options.experts = 3;
  options.replicas = 2;
  LocalCluster cluster(options);
  std::thread killer([&] {
    while (cluster.engine().status().generated_tokens < 5) absl::SleepFor(absl::Milliseconds(1));
    cluster.StopExpert(1);
  });
  const Generation result = cluster.Run(Greedy(golden.input_ids, 40, true));
  killer.join();
  EXPECT_EQ(BitsOf(result), want);
}

}  // namespace
}  // namespace minke
