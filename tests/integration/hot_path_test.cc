// The steady state allocates nothing per layer: operator new is counted on the threads that compute and
// exchange rows while a batch decodes. An attention node's step allocates for its plan and events, whatever
// the layers.
#include "gtest/gtest.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::Allocations;
using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

class HotPath : public testing::TestWithParam<std::tuple<bool, bool>> {};
INSTANTIATE_TEST_SUITE_P(Paths, HotPath, testing::Combine(testing::Bool(), testing::Bool()),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) ? "Ucx" : "Inproc") +
                                  (std::get<1>(info.param) ? "LocalGate" : "Router");
                         });

TEST_P(HotPath, LayersOfDecodingAllocateNothing) {
  const auto [ucx, local_routing] = GetParam();
  ClusterOptions options{
      .checkpoint = Golden::Get("v2").checkpoint, .precision = Precision::kBF16, .experts = 2};
  options.ucx = ucx;
  options.local_routing = local_routing;
  LocalCluster cluster(options);
  constexpr uint32_t kTokens = 40;
  const std::vector<uint32_t> prompt = Golden::Get("v2").input_ids;
  const std::vector<inference::v1::Submit> batch(4, Greedy(prompt, kTokens, false));
  const auto run = [&] {
    for (const Generation& g : cluster.Run(batch)) ASSERT_EQ(g.tokens.size(), kTokens) << g.error;
  };
  run();  // everything that grows has grown
  run();
  const uint64_t before = cluster.engine().status().steps;
  const Allocations counter;
  run();
  const uint64_t steps = cluster.engine().status().steps - before;
  ASSERT_GE(steps, kTokens);
  // Scratch may still grow where messages are merged as never before; once per layer would be 3 x steps.
  const uint64_t growth = steps / 2;
  EXPECT_LE(counter.OfThreads("router-engine"), growth);
  EXPECT_LE(counter.OfThreads("expert-engine"), growth);
  EXPECT_LE(counter.OfThreads("compute"), growth);
  // Chunks, events and tokens of four streams, and taking in the requests.
  const uint64_t attention = counter.OfThreads("attn-engine");
  EXPECT_LE(attention / steps, 40u) << attention << " in " << steps << " steps";
  RecordProperty("attention_allocations_per_step", static_cast<int>(attention / steps));
}

}  // namespace
}  // namespace minke
