#include "cli/pool.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

using namespace cluster::v1;  // NOLINT: enumerators
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

Child Of(Role role, ChildState state, const std::string& name = "", int pid = 1) {
  Child child;
  child.set_role(role);
  child.set_state(state);
  child.set_name(name);
  child.set_pid(pid);
  return child;
}

std::vector<Child> SomeCluster() {
  return {Of(ROLE_ROUTER, CHILD_STATE_RUNNING),     // 0
          Of(ROLE_EXPERT, CHILD_STATE_RUNNING),     // 1
          Of(ROLE_EXPERT, CHILD_STATE_ENDED),       // 2
          Of(ROLE_ATTENTION, CHILD_STATE_RUNNING),  // 3
          Of(ROLE_GATEWAY, CHILD_STATE_RUNNING),    // 4
          Of(ROLE_EXPERT, CHILD_STATE_RESTARTING),  // 5
          Of(ROLE_EXPERT, CHILD_STATE_DRAINING),    // 6
          Of(ROLE_EXPERT, CHILD_STATE_STARTING)};   // 7
}

std::string Refusal(Role role, int64_t count, const PoolLimits& limits) {
  const auto plan = PlanScale(SomeCluster(), role, count, limits);
  EXPECT_FALSE(plan.ok());
  return std::string(plan.status().message());
}

TEST(PlanScale, RefusesWhatCannotBeHad) {
  EXPECT_EQ(Refusal(ROLE_EXPERT, 0, {}), "experts: expected at least 1, found 0");
  EXPECT_EQ(Refusal(ROLE_ATTENTION, -3, {}), "attention: expected at least 1, found -3");
  EXPECT_EQ(Refusal(ROLE_EXPERT, 257, {}), "experts: expected at most 256, found 257");
  EXPECT_THAT(Refusal(ROLE_EXPERT, 1, {.replicas = 2}), HasSubstr("--replicas (2), found 1"));
  EXPECT_THAT(Refusal(ROLE_ROUTER, 2, {}), HasSubstr("--registry=etcd"));
  EXPECT_THAT(Refusal(ROLE_GATEWAY, 2, {}), HasSubstr("cannot be scaled"));
  EXPECT_THAT(Refusal(ROLE_GATEWAY, 1, {}), HasSubstr("cannot be scaled"));
  EXPECT_THAT(Refusal(ROLE_UNSPECIFIED, 1, {}), HasSubstr("role"));
}

TEST(PlanScale, CountsThoseThatStay) {
  const auto same = PlanScale(SomeCluster(), ROLE_EXPERT, 3, {});
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(same->start, 0);
  EXPECT_THAT(same->drain, IsEmpty());
  const auto more = PlanScale(SomeCluster(), ROLE_EXPERT, 5, {});
  ASSERT_TRUE(more.ok()) << more.status();
  EXPECT_EQ(more->start, 2);
  EXPECT_THAT(more->drain, IsEmpty());
}

TEST(PlanScale, YoungestLeaveFirst) {
  const auto plan = PlanScale(SomeCluster(), ROLE_EXPERT, 1, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->start, 0);
  EXPECT_THAT(plan->drain, ElementsAre(7, 5));
}

TEST(PlanScale, RoutersNeedEtcdOnlyForMoreThanOne) {
  const auto more = PlanScale(SomeCluster(), ROLE_ROUTER, 3, {.etcd = true});
  ASSERT_TRUE(more.ok()) << more.status();
  EXPECT_EQ(more->start, 2);
  EXPECT_TRUE(PlanScale(SomeCluster(), ROLE_ROUTER, 1, {}).ok());
}

TEST(PlanDrain, RefusesWhatCannotBeHad) {
  std::vector<Child> children = SomeCluster();
  for (size_t i = 0; i < children.size(); ++i) children[i].set_pid(static_cast<int>(100 + i));
  const auto refusal = [&](Role role, int32_t pid, const PoolLimits& limits = {}) {
    const auto plan = PlanDrain(children, role, pid, limits);
    EXPECT_FALSE(plan.ok());
    return std::string(plan.status().message());
  };
  EXPECT_EQ(refusal(ROLE_EXPERT, 99), "experts: no process of this minke up has pid 99");
  EXPECT_THAT(refusal(ROLE_EXPERT, 103), HasSubstr("no process"));  // an attention node's
  EXPECT_THAT(refusal(ROLE_EXPERT, 102), HasSubstr("no process"));  // has ended
  EXPECT_THAT(refusal(ROLE_EXPERT, 106), HasSubstr("no process"));  // drains already
  EXPECT_THAT(refusal(ROLE_UNSPECIFIED, 0), HasSubstr("no process"));
  EXPECT_EQ(refusal(ROLE_ATTENTION, 103), "attention: expected at least 1, found 0");
  EXPECT_THAT(refusal(ROLE_ROUTER, 100), HasSubstr("at least 1"));
  EXPECT_THAT(refusal(ROLE_GATEWAY, 104), HasSubstr("cannot be drained"));
  EXPECT_THAT(refusal(ROLE_EXPERT, 101, {.replicas = 3}), HasSubstr("--replicas (3), found 2"));
}

TEST(PlanDrain, FindsTheOneAsked) {
  std::vector<Child> children = SomeCluster();
  for (size_t i = 0; i < children.size(); ++i) children[i].set_pid(static_cast<int>(100 + i));
  const auto plan = PlanDrain(children, ROLE_EXPERT, 105, {.replicas = 2});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(*plan, 5u);
}

TEST(ParsePool, NamesOfWhatCanBeScaled) {
  EXPECT_THAT(ParsePool("gateway").status().message(), HasSubstr("cannot be scaled"));
  EXPECT_THAT(ParsePool("expert").status().message(), HasSubstr("found 'expert'"));
  for (const Role role : {ROLE_EXPERT, ROLE_ATTENTION, ROLE_ROUTER})
    EXPECT_EQ(*ParsePool(PoolName(role)), role);
}

TEST(RestartPause, DoublesUpToItsLimit) {
  RestartPause pause;
  std::vector<int64_t> milliseconds;
  for (int i = 0; i < 7; ++i) milliseconds.push_back(absl::ToInt64Milliseconds(pause.Next(absl::Seconds(1))));
  EXPECT_THAT(milliseconds, ElementsAre(200, 400, 800, 1600, 3200, 5000, 5000));
}

TEST(RestartPause, BeginsAnewAfterALongLife) {
  RestartPause pause;
  for (int i = 0; i < 4; ++i) pause.Next(absl::ZeroDuration());
  EXPECT_EQ(pause.Next(absl::Seconds(30)), absl::Milliseconds(200));
  EXPECT_EQ(pause.Next(absl::Seconds(29)), absl::Milliseconds(400));
}

TEST(WhatIsLeft, NamesThoseThatStartAndThoseThatDrain) {
  ScaleAnswer scaled;
  StatusAnswer status;
  *scaled.add_started() = *status.add_children() = Of(ROLE_EXPERT, CHILD_STATE_STARTING, "expert 1", 11);
  *scaled.add_draining() = *status.add_children() = Of(ROLE_EXPERT, CHILD_STATE_DRAINING, "expert 2", 12);
  EXPECT_EQ(*WhatIsLeft(scaled, status), "starting: expert 1 (pid 11); draining: expert 2 (pid 12)");
  status.mutable_children(0)->set_state(CHILD_STATE_RESTARTING);
  EXPECT_THAT(*WhatIsLeft(scaled, status), HasSubstr("starting: expert 1"));
  status.mutable_children(0)->set_state(CHILD_STATE_RUNNING);
  EXPECT_EQ(*WhatIsLeft(scaled, status), "draining: expert 2 (pid 12)");
  status.mutable_children()->RemoveLast();
  EXPECT_EQ(*WhatIsLeft(scaled, status), "");
}

TEST(WhatIsLeft, ProcessThatDiedForGoodIsAnError) {
  ScaleAnswer scaled;
  StatusAnswer status;
  *scaled.add_started() = Of(ROLE_ATTENTION, CHILD_STATE_STARTING, "attention 1", 11);
  *status.add_children() = Of(ROLE_ATTENTION, CHILD_STATE_ENDED, "attention 1", 11);
  EXPECT_EQ(WhatIsLeft(scaled, status).status().message(), "attention 1 (pid 11) has died");
  // Drained by somebody else before it had started.
  status.mutable_children(0)->set_state(CHILD_STATE_DRAINING);
  EXPECT_EQ(*WhatIsLeft(scaled, status), "");
}

}  // namespace
}  // namespace minke::cli
