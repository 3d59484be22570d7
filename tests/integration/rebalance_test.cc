// Groups of which all the hot ones happen to lie on one server: seen by the router, moved by the coordinator
// while requests run, and nothing of an answer changes.
#include <algorithm>
#include <atomic>
#include <functional>
#include <map>

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
  const std::map<UnitId, NodeId> before = servers();
  const auto layer = static_cast<uint32_t>(config.MoeLayers().front());
  uint32_t a = 0, b = 1;
  while (before.at({layer, b}) != before.at({layer, a})) ++b;

  first = static_cast<int>(a);
  second = static_cast<int>(b);
  const inference::v1::Submit request = Greedy(golden.input_ids, 24, false);
  const Generation want = cluster.Run(request);
  ASSERT_TRUE(want.error.ok()) << want.error;
  const auto all_spread = [&] {
    const std::map<UnitId, NodeId> now = servers();
    return std::ranges::all_of(config.MoeLayers(), [&](int32_t moe_layer) {
      const auto at = static_cast<uint32_t>(moe_layer);
      return !(now.at({at, a}) == now.at({at, b}));
    });
  };
  const auto serve_until = [&](absl::Duration limit, const std::function<bool()>& done) {
    for (const absl::Time end = absl::Now() + limit; absl::Now() < end && !done();) {
      const Generation got = cluster.Run(request);
      ASSERT_TRUE(got.error.ok()) << got.error;
      ASSERT_EQ(got.tokens, want.tokens);
      ASSERT_EQ(got.logprobs, want.logprobs);
    }
  };
  serve_until(absl::Seconds(60), all_spread);
  ASSERT_TRUE(all_spread()) << "hot groups " << a << " and " << b << " share a server after 60 s";
  // Both servers are back at their part of the units, and nothing moves any more.
  const auto at_rest = [&] {
    std::map<NodeId, int> hosted;
    for (const auto& [unit, replicas] : cluster::Replicas(cluster.view())) {
      for (const NodeId server : replicas.servers) ++hosted[server];
    }
    return std::ranges::all_of(hosted,
                               [&](const auto& entry) { return entry.second <= std::ssize(before) / 2; });
  };
  serve_until(absl::Seconds(60), at_rest);
  EXPECT_TRUE(at_rest());
  const uint32_t epoch = cluster.view().epoch().counter();
  serve_until(absl::Seconds(2), [] { return false; });
  EXPECT_EQ(cluster.view().epoch().counter(), epoch);
}

}  // namespace
}  // namespace minke
