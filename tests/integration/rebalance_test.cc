// Groups of which all the hot ones happen to lie on one server: seen by the router, moved by the coordinator
// while requests run, and nothing of an answer changes.
#include <atomic>
#include <map>
#include <set>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/cluster/view.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

TEST(Rebalance, HotGroupsOfOneServerAreSpreadWhileRequestsRun) {
  const Golden& golden = Golden::Get("v2");
  const ModelConfig config = Checkpoint::Open(golden.checkpoint).value()->config();
  ASSERT_EQ(config.num_experts_per_tok % 2, 0);
  // The experts of every row come from these two groups, once they are set.
  std::atomic<int> first{-1}, second{-1};
  ClusterOptions options{.checkpoint = golden.checkpoint};
  options.experts = 2;
  options.gate_override = [&](int32_t, uint32_t, std::span<uint16_t> experts) {
    const int a = first.load(), b = second.load();
    if (b < 0) return false;
    const size_t half = experts.size() / 2;
    for (size_t i = 0; i < experts.size(); ++i) {
      const ExpertRange range = config.GroupExperts(i < half ? std::min(a, b) : std::max(a, b));
      experts[i] = static_cast<uint16_t>(range.begin + i % half);
    }
    return true;
  };
  LocalCluster cluster(options);

  // Where the rows of each unit go.
  const auto servers = [&] {
    std::map<UnitId, NodeId> all;
    for (const auto& [unit, replicas] : cluster::Replicas(cluster.view())) {
      for (size_t i = 0; i < replicas.servers.size(); ++i) {
        if (replicas.weights.empty() || replicas.weights[i] > 0) all[unit] = replicas.servers[i];
      }
    }
    return all;
  };
  const int32_t layer = config.MoeLayers().front();
  const std::map<UnitId, NodeId> before = servers();
  const auto at = [&](const std::map<UnitId, NodeId>& all, int group) {
    return all.at({static_cast<uint32_t>(layer), static_cast<uint32_t>(group)});
  };
  int a = 0, b = 1;
  while (at(before, b) != at(before, a)) ++b;

  first = a;
  second = b;
  const inference::v1::Submit request = Greedy(golden.input_ids, 24, false);
  const Generation want = cluster.Run(request);
  ASSERT_TRUE(want.error.ok()) << want.error;
  int64_t requests = 0;
  const absl::Time limit = absl::Now() + absl::Seconds(60);
  bool spread = false;
  for (; !spread && absl::Now() < limit; ++requests) {
    const Generation got = cluster.Run(request);
    ASSERT_TRUE(got.error.ok()) << got.error;
    ASSERT_EQ(got.tokens, want.tokens);
    ASSERT_EQ(got.logprobs, want.logprobs);
    const std::map<UnitId, NodeId> now = servers();
    spread = !(at(now, a) == at(now, b));
  }
  EXPECT_TRUE(spread) << "both hot groups of layer " << layer << " are still on one server after " << requests
                      << " requests";
}

}  // namespace
}  // namespace minke
