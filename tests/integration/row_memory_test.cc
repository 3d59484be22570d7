// Clusters whose attention nodes and expert servers have row memory (host memory posing as a GPU's): the same
// bits as with rows in host memory, whatever is lost on the way and however little of it there is.
#include <random>
#include <thread>

#include "absl/time/clock.h"
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

constexpr int kPlenty = 400;  // blocks

struct Bits {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs, prompt_logprobs;
  friend bool operator==(const Bits&, const Bits&) = default;
};
std::vector<Bits> BitsOf(const std::vector<Generation>& generations) {
  std::vector<Bits> bits;
  for (const Generation& g : generations) {
    EXPECT_TRUE(g.error.ok()) << g.error;
    bits.push_back({g.tokens, g.logprobs, g.prompt_logprobs});
  }
  return bits;
}

// Two long prompts, whose rows take several messages, and short ones.
std::vector<inference::v1::Submit> Requests(int tokens) {
  std::mt19937 rng(8);
  std::vector<inference::v1::Submit> requests;
  for (const int length : {300, 3, 40, 1, 200}) {
    std::vector<uint32_t> prompt(length);
    for (uint32_t& id : prompt) id = 2 + rng() % 500;
    requests.push_back(Greedy(prompt, tokens, true));
  }
  return requests;
}

std::vector<Bits> InHostMemory(const char* name, int tokens) {
  LocalCluster cluster({.checkpoint = Golden::Get(name).checkpoint});
  return BitsOf(cluster.Run(Requests(tokens)));
}

void ExpectNoneInUse(const LocalCluster& cluster) {
  const absl::Time limit = absl::Now() + absl::Seconds(5);  // the last send may still be on its way
  while (cluster.blocks_in_use() > 0 && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_EQ(cluster.blocks_in_use(), 0);
}

struct Where {
  const char* name;
  int attention_blocks, router_blocks, expert_blocks;
  bool poses = true;
};
// Nodes with and without row memory, and one whose model is the host's although its transport has it.
constexpr Where kWhere[] = {{"All", kPlenty, kPlenty, kPlenty},
                            {"Attention", kPlenty, 0, 0},
                            {"Router", 0, kPlenty, 0},
                            {"Experts", 0, 0, kPlenty},
                            {"AllButRouter", kPlenty, 0, kPlenty},
                            {"TransportOnly", kPlenty, kPlenty, kPlenty, false}};

class RowMemoryCluster : public testing::TestWithParam<Where> {
 protected:
  static ClusterOptions Options(const char* name) {
    ClusterOptions options{.checkpoint = Golden::Get(name).checkpoint};
    options.attention_row_blocks = GetParam().attention_blocks;
    options.router_row_blocks = GetParam().router_blocks;
    options.expert_row_blocks = GetParam().expert_blocks;
    options.attention_poses = GetParam().poses;
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(Where, RowMemoryCluster, testing::ValuesIn(kWhere),
                         [](const auto& info) { return info.param.name; });

TEST_P(RowMemoryCluster, SameBitsOnAnyPlacementRoutingTransportAndMicrobatching) {
  for (const char* name : {"v2", "plain"}) {
    const std::vector<Bits> want = InHostMemory(name, 8);
    for (const bool ucx : {false, true}) {
      for (const bool local : {false, true}) {
        for (const int microbatches : {1, 2}) {
          ClusterOptions options = Options(name);
          options.ucx = ucx;
          options.experts = 3;
          options.replicas = 2;
          options.local_routing = local;
          options.microbatches = microbatches;
          LocalCluster cluster(options);
          EXPECT_EQ(BitsOf(cluster.Run(Requests(8))), want)
              << name << ", ucx " << ucx << ", local " << local << ", microbatches " << microbatches;
          const LocalCluster::RowFrames frames = cluster.row_frames();
          const Where& where = GetParam();
          if (where.attention_blocks > 0 && where.expert_blocks > 0) {
            EXPECT_GT(frames.in_row_memory, 0u);
          }
          ExpectNoneInUse(cluster);
        }
      }
    }
  }
}

// Messages and answers find a block, or do not, in every combination.
TEST_P(RowMemoryCluster, SameBitsWhereBlocksRunOut) {
  const std::vector<Bits> want = InHostMemory("v2", 8);
  for (const bool ucx : {false, true}) {
    for (const int blocks : {1, 2, 5}) {
      ClusterOptions options = Options("v2");
      options.ucx = ucx;
      options.microbatches = 2;
      if (options.attention_row_blocks > 0) options.attention_row_blocks = blocks;
      if (options.router_row_blocks > 0) options.router_row_blocks = blocks;
      if (options.expert_row_blocks > 0) options.expert_row_blocks = blocks;
      LocalCluster cluster(options);
      EXPECT_EQ(BitsOf(cluster.Run(Requests(8))), want) << "ucx " << ucx << ", " << blocks << " blocks";
      ExpectNoneInUse(cluster);
    }
  }
}

// Lost, repeated, late and reordered messages: rows are sent again from where they lie.
TEST_P(RowMemoryCluster, SameBitsOverAFaultyTransport) {
  const std::vector<Bits> want = InHostMemory("v2", 12);
  uint64_t redispatched = 0, plan_retries = 0;
  for (const bool local : {false, true}) {
    for (const int blocks : {3, kPlenty}) {
      ClusterOptions options = Options("v2");
      options.local_routing = local;
      options.microbatches = 2;
      options.experts = 3;
      options.replicas = 2;
      if (options.attention_row_blocks > 0) options.attention_row_blocks = blocks;
      if (options.router_row_blocks > 0) options.router_row_blocks = blocks;
      if (options.expert_row_blocks > 0) options.expert_row_blocks = blocks;
      options.step_tokens_max = 100;
      options.exchange.plan_timeout = absl::Milliseconds(15);
      options.exchange.result_timeout = absl::Milliseconds(25);
      options.faults = transport::FaultOptions{.seed = 7,
                                               .drop_probability = 0.1,
                                               .duplicate_probability = 0.1,
                                               .delay_probability = 0.1,
                                               .delay_max = absl::Milliseconds(8),
                                               .reorder_probability = 0.2};
      LocalCluster cluster(options);
      EXPECT_EQ(BitsOf(cluster.Run(Requests(12))), want) << "local " << local << ", " << blocks << " blocks";
      const attention::EngineStatus status = cluster.engine().status();
      redispatched += status.redispatched_rows;
      plan_retries += status.plan_retries;
      EXPECT_EQ(status.bad_frames, 0u);
      ExpectNoneInUse(cluster);
    }
  }
  EXPECT_GT(redispatched, 0u);
  EXPECT_GT(plan_retries, 0u);
}

// One message in fifty of one server is late: another replica is asked for the same rows.
TEST_P(RowMemoryCluster, ReplicaAnswersForASlowServerWithTheSameBits) {
  const std::vector<Bits> want = InHostMemory("v2", 80);
  ClusterOptions options = Options("v2");
  options.experts = 2;
  options.replicas = 2;
  options.exchange.hedge_factor = 1;
  options.expert_faults =
      transport::FaultOptions{.seed = 3, .delay_probability = 0.02, .delay_max = absl::Seconds(2)};
  LocalCluster cluster(options);
  EXPECT_EQ(BitsOf(cluster.Run(Requests(80))), want);
  EXPECT_GT(cluster.engine().status().hedged_rows, 0u);
  ExpectNoneInUse(cluster);
}

TEST_P(RowMemoryCluster, ReplicaTakesOverWithTheSameBits) {
  const std::vector<Bits> want = InHostMemory("v2", 60);
  for (const bool ucx : {false, true}) {
    ClusterOptions options = Options("v2");
    options.ucx = ucx;
    options.experts = 2;
    options.replicas = 2;
    LocalCluster cluster(options);
    std::vector<Bits> got;
    std::thread client([&] { got = BitsOf(cluster.Run(Requests(60))); });
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (cluster.engine().status().generated_tokens < 20 && absl::Now() < limit)
      absl::SleepFor(absl::Milliseconds(1));
    cluster.StopExpert(1);
    client.join();
    EXPECT_EQ(got, want) << "ucx " << ucx;
    ExpectNoneInUse(cluster);
  }
}

// With blocks for all, no row of a message crosses host memory: not of those sent for routing, nor of work,
// nor of sums.
TEST(RowMemory, RowsDoNotCrossHostMemory) {
  for (const bool ucx : {false, true}) {
    ClusterOptions options{.checkpoint = Golden::Get("v2").checkpoint};
    options.ucx = ucx;
    options.attention_row_blocks = options.router_row_blocks = options.expert_row_blocks = kPlenty;
    LocalCluster cluster(options);
    std::vector<inference::v1::Submit> requests = Requests(8);
    // UCX's header has room for the descriptors of real models' messages, not of hundreds of tiny rows.
    std::erase_if(requests, [](const auto& request) { return request.prompt_token_ids_size() > 100; });
    (void)BitsOf(cluster.Run(requests));
    const LocalCluster::RowFrames frames = cluster.row_frames();
    EXPECT_GT(frames.in_row_memory, 100u);
    EXPECT_EQ(frames.in_host_memory, 0u) << "ucx " << ucx;
  }
}

}  // namespace
}  // namespace minke
