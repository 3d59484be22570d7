#include "services/gateway/cluster_view/cluster_monitor.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace minke::gateway {
namespace {

using cluster::v1::ClusterUpdate;
using cluster::v1::Member;
using cluster::v1::Role;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kRouter = 0xa000000000000001, kAttention = 0xb000000000000001,
                   kExpert = 0xe000000000000001, kOther = 0xe000000000000002;

class ClusterMonitorTest : public ::testing::Test {
 protected:
  ClusterMonitorTest() {
    for (const auto& [id, role] : {std::pair{kRouter, cluster::v1::ROLE_ROUTER},
                                   {kAttention, cluster::v1::ROLE_ATTENTION},
                                   {kExpert, cluster::v1::ROLE_EXPERT}}) {
      Join(id, role);
    }
    Send();
  }
  Member& Join(uint64_t id, Role role) {
    Member& member = members_[id];
    member.set_node_id(id);
    member.set_role(role);
    member.set_ready(true);
    member.set_rpc_address("10.0.0.1:7000");
    return member;
  }
  // The view with what members_ has; two layers of one group each, on kExpert.
  void Send(uint32_t epoch = 1) {
    ClusterUpdate update;
    update.mutable_view()->set_ready(true);
    update.mutable_view()->mutable_epoch()->set_term(5);
    update.mutable_view()->mutable_epoch()->set_counter(epoch);
    for (const auto& [id, member] : members_) *update.mutable_view()->add_members() = member;
    for (const uint32_t layer : {1, 2}) {
      auto* unit = update.mutable_view()->add_placement();
      unit->mutable_unit()->set_layer(layer);
      if (members_.contains(kExpert)) unit->add_node_ids(kExpert);
    }
    monitor_.OnUpdate(update, now_);
  }
  void SendLoad(uint64_t id, const cluster::v1::MemberLoad& load) {
    ClusterUpdate update;
    update.set_leader(kRouter);
    auto* status = update.add_statuses();
    status->set_node_id(id);
    *status->mutable_load() = load;
    monitor_.OnUpdate(update, now_);
  }
  void SendLost(std::vector<uint64_t> lost) {
    ClusterUpdate update;
    update.set_leader(kRouter);
    auto* status = update.add_statuses();
    status->set_node_id(kRouter);
    for (const uint64_t id : lost) status->add_lost(id);
    monitor_.OnUpdate(update, now_);
  }
  void Pass(absl::Duration time) { now_ += time; }
  // "" if it is not shown.
  std::string StateOf(uint64_t id) {
    for (const MemberSnapshot& member : monitor_.Snapshot(now_).members) {
      if (member.id == NodeId{id}) return ToString(member.state);
    }
    return "";
  }
  std::vector<std::string> Events() {
    std::vector<std::string> texts;
    for (const ClusterEvent& event : monitor_.Snapshot(now_).events) texts.push_back(event.text);
    return texts;
  }
  nlohmann::json Json() { return nlohmann::json::parse(ToJson(monitor_.Snapshot(now_), {.model = "m"})); }

  GatewayCounters counters_;
  ClusterMonitor monitor_{&counters_};
  std::map<uint64_t, Member> members_;
  absl::Time now_ = absl::FromUnixSeconds(1'800'000'000);
};

TEST_F(ClusterMonitorTest, WhatWasThereBeforeIsNoEvent) {
  EXPECT_THAT(Events(), ElementsAre("placement epoch 5.1", "the cluster is ready"));
  EXPECT_EQ(StateOf(kExpert), "ready");
}

TEST_F(ClusterMonitorTest, AMemberThatVanishesIsLostAfterTheGraceAndNotBefore) {
  members_.erase(kExpert);
  Send();
  Pass(absl::Milliseconds(900));
  EXPECT_EQ(StateOf(kExpert), "ready");
  Pass(absl::Milliseconds(200));
  EXPECT_EQ(StateOf(kExpert), "lost");
  EXPECT_THAT(Events(), Contains("expert server e0000000 was lost"));
  Pass(ClusterMonitor::kLostShownMax);
  EXPECT_EQ(StateOf(kExpert), "");
}

TEST_F(ClusterMonitorTest, ARestartedRouterBreaksNothing) {
  members_.erase(kExpert);
  members_.erase(kAttention);
  Send();
  Pass(absl::Milliseconds(500));
  Join(kExpert, cluster::v1::ROLE_EXPERT);
  Join(kAttention, cluster::v1::ROLE_ATTENTION);
  Send();
  Pass(absl::Seconds(5));
  EXPECT_EQ(StateOf(kExpert), "ready");
  EXPECT_THAT(Events(), Not(Contains(HasSubstr("lost"))));
}

TEST_F(ClusterMonitorTest, ALostMemberIsShownUntilOneThatCameLaterTakesItsPlace) {
  members_.erase(kExpert);
  Send();
  Pass(absl::Seconds(2));
  EXPECT_EQ(StateOf(kExpert), "lost");
  Join(kOther, cluster::v1::ROLE_EXPERT).set_ready(false);
  Send();
  Pass(absl::Seconds(10));
  EXPECT_EQ(StateOf(kExpert), "lost");
  EXPECT_EQ(StateOf(kOther), "loading");
  members_[kOther].set_ready(true);
  Send();
  EXPECT_EQ(StateOf(kOther), "ready");
  EXPECT_EQ(StateOf(kExpert), "");
}

TEST_F(ClusterMonitorTest, AMemberThatWasThereBeforeTakesNoPlace) {
  Join(kOther, cluster::v1::ROLE_EXPERT);
  Send();
  Pass(absl::Seconds(10));
  members_.erase(kExpert);
  Send();
  Pass(absl::Seconds(20));
  EXPECT_EQ(StateOf(kExpert), "lost");
}

TEST_F(ClusterMonitorTest, OneThatWasStartedAgainBeforeTheLossWasSeenTakesThePlace) {
  Join(kOther, cluster::v1::ROLE_EXPERT);
  Send();
  Pass(absl::Seconds(2));
  SendLost({kExpert});  // etcd: a member until its lease runs out
  Pass(absl::Seconds(2));
  members_.erase(kExpert);
  Send();
  EXPECT_EQ(StateOf(kExpert), "lost");
  Pass(absl::Seconds(4));
  EXPECT_EQ(StateOf(kExpert), "");
}

TEST_F(ClusterMonitorTest, ADrainedMemberLeavesAndIsNotLost) {
  members_[kExpert].set_draining(true);
  Send();
  EXPECT_EQ(StateOf(kExpert), "draining");
  members_.erase(kExpert);
  Send();
  EXPECT_EQ(StateOf(kExpert), "left");
  EXPECT_THAT(Events(), Contains("expert server e0000000 left"));
  Pass(ClusterMonitor::kLeftShown);
  EXPECT_EQ(StateOf(kExpert), "");
}

TEST_F(ClusterMonitorTest, AMemberThatRoutersCannotReachIsLostUntilTheyCan) {
  SendLost({kExpert});
  EXPECT_EQ(StateOf(kExpert), "lost");
  Send();  // a view does not know
  EXPECT_EQ(StateOf(kExpert), "lost");
  SendLost({});
  EXPECT_EQ(StateOf(kExpert), "ready");
  EXPECT_THAT(Events(), Contains("expert server e0000000 is back"));
}

TEST_F(ClusterMonitorTest, EpochsInARowAreOneEvent) {
  for (uint32_t epoch = 2; epoch < 9; ++epoch) {
    Pass(absl::Milliseconds(50));
    members_[kExpert].set_ready(epoch % 2 == 0);
    Send(epoch);
  }
  EXPECT_THAT(Events(), Contains("placement epoch 5.8"));
  EXPECT_THAT(Events(), Not(Contains("placement epoch 5.3")));
  Pass(absl::Minutes(1));
  Send(9);
  EXPECT_THAT(Events(), Contains("placement epoch 5.8"));
  EXPECT_THAT(Events(), Contains("placement epoch 5.9"));
}

TEST_F(ClusterMonitorTest, FailoversAreCountedAndGathered) {
  counters_.resubmissions = 3;
  EXPECT_THAT(Events(), Contains("3 sequences moved on from an attention node that was lost or silent"));
  Pass(absl::Seconds(1));
  counters_.resubmissions = 5;
  EXPECT_THAT(Events(), Contains("5 sequences moved on from an attention node that was lost or silent"));
  Pass(absl::Minutes(1));
  counters_.resubmissions = 6;
  EXPECT_THAT(Events(), Contains("1 sequences moved on from an attention node that was lost or silent"));
}

TEST_F(ClusterMonitorTest, RowsSentAgainBeforeTheFirstLookAreNoEvent) {
  cluster::v1::MemberLoad load;
  load.set_redispatched_rows(100);
  SendLoad(kAttention, load);
  EXPECT_THAT(Events(), Not(Contains(HasSubstr("rows sent"))));
  load.set_redispatched_rows(140);
  SendLoad(kAttention, load);
  EXPECT_THAT(Events(), Contains("40 rows sent to experts again by attention node b0000000"));
}

TEST_F(ClusterMonitorTest, EventsAndMembersAreBounded) {
  for (uint64_t i = 0; i < ClusterMonitor::kMembersMax + 50; ++i) Join(0x1000 + i, cluster::v1::ROLE_EXPERT);
  Send();
  const ClusterSnapshot snapshot = monitor_.Snapshot(now_);
  EXPECT_EQ(snapshot.members.size(), ClusterMonitor::kMembersMax);
  EXPECT_EQ(snapshot.events.size(), ClusterMonitor::kEventsMax);
  const nlohmann::json heat = Json()["heat"];
  EXPECT_EQ(heat["servers"].size(), 64u);
  EXPECT_EQ(heat["servers_total"], ClusterMonitor::kMembersMax - 2);
}

TEST_F(ClusterMonitorTest, JsonHasPoolsAndTheHeatMap) {
  cluster::v1::MemberLoad load;
  load.set_rows_per_s(30);
  load.add_layer_rows_per_s(10.26f);
  load.add_layer_rows_per_s(19.74f);
  SendLoad(kExpert, load);
  const nlohmann::json json = Json();
  EXPECT_EQ(json["leader"], "a000000000000001");
  EXPECT_EQ(json["epoch"], nlohmann::json({{"term", 5}, {"counter", 1}}));
  ASSERT_EQ(json["pools"].size(), 4u);
  const nlohmann::json& gateways = json["pools"][0];
  EXPECT_EQ(gateways["health"], "down");
  EXPECT_EQ(gateways["members"].size(), 0u);
  const nlohmann::json& experts = json["pools"][3];
  EXPECT_EQ(experts["name"], "experts");
  EXPECT_EQ(experts["health"], "ok");
  EXPECT_EQ(experts["members"][0]["id"], "e000000000000001");
  EXPECT_EQ(experts["members"][0]["load"]["units"], 2);
  EXPECT_EQ(json["heat"]["layers"], nlohmann::json({1, 2}));
  EXPECT_EQ(json["heat"]["servers"], nlohmann::json({"e000000000000001"}));
  EXPECT_EQ(json["heat"]["rows_per_s"][0][0].get<float>(), 10.3f);
  EXPECT_EQ(json["heat"]["rows_per_s"][1][0].get<float>(), 19.7f);
}

TEST_F(ClusterMonitorTest, APoolWithALostMemberIsDegraded) {
  Join(kOther, cluster::v1::ROLE_EXPERT);
  Send();
  SendLost({kOther});
  EXPECT_EQ(Json()["pools"][3]["health"], "degraded");
  SendLost({kOther, kExpert});
  EXPECT_EQ(Json()["pools"][3]["health"], "down");
}

TEST_F(ClusterMonitorTest, TheRegistrysSilenceIsToldOnce) {
  monitor_.SetRegistryConnected(false, now_);
  monitor_.SetRegistryConnected(false, now_);
  EXPECT_EQ(Json()["registry_connected"], false);
  monitor_.SetRegistryConnected(true, now_);
  const std::vector<std::string> events = Events();
  EXPECT_EQ(std::count(events.begin(), events.end(), "the registry does not answer"), 1);
  EXPECT_THAT(events, Contains("the registry answers again"));
}

}  // namespace
}  // namespace minke::gateway
