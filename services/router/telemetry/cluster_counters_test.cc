#include "services/router/telemetry/cluster_counters.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::router {
namespace {

void AddUnit(cluster::v1::ClusterView& view, uint32_t group, std::initializer_list<uint64_t> servers) {
  cluster::v1::UnitReplicas* unit = view.add_placement();
  unit->mutable_unit()->set_layer(1);
  unit->mutable_unit()->set_group(group);
  for (const uint64_t server : servers) unit->add_node_ids(server);
}

double ValueOf(const telemetry::Page& page, const char* name, const telemetry::Labels& labels) {
  const telemetry::Family* family = page.Find(name);
  EXPECT_NE(family, nullptr) << name;
  for (const telemetry::Point& point : family->points) {
    if (point.labels == labels) return point.value;
  }
  ADD_FAILURE() << name << ": no such series";
  return -1;
}

TEST(ClusterCounters, CountsReplicasThatComeAndGo) {
  ClusterCounters counters;
  cluster::v1::ClusterView view;
  view.mutable_epoch()->set_term(3);
  view.mutable_epoch()->set_counter(1);
  AddUnit(view, 0, {1});
  AddUnit(view, 1, {2});
  counters.OnView(view);
  counters.OnView(view);  // nothing new
  view.clear_placement();
  view.mutable_epoch()->set_counter(2);
  AddUnit(view, 0, {1, 2});
  AddUnit(view, 1, {1});
  counters.OnView(view);
  telemetry::Page page;
  counters.Collect(page);
  EXPECT_EQ(ValueOf(page, "minke:replica_moves_total", {{"kind", "add"}}), 4);
  EXPECT_EQ(ValueOf(page, "minke:replica_moves_total", {{"kind", "drop"}}), 1);
  EXPECT_EQ(ValueOf(page, "minke:replicas", {{"layer", "1"}, {"group", "0"}}), 2);
  EXPECT_EQ(ValueOf(page, "minke:placement_epoch", {}), 2);
  EXPECT_EQ(ValueOf(page, "minke:placement_term", {}), 3);
}

TEST(ClusterCounters, MembersByRoleAndState) {
  ClusterCounters counters;
  cluster::v1::ClusterView view;
  for (int i = 0; i < 3; ++i) {
    cluster::v1::Member* member = view.add_members();
    member->set_node_id(i + 1);
    member->set_role(cluster::v1::ROLE_EXPERT);
    member->set_rpc_address("10.0.0.1:7000");
    member->set_ready(i != 1);
    member->set_draining(i == 2);
  }
  counters.OnView(view);
  telemetry::Page page;
  counters.Collect(page);
  for (const char* state : {"starting", "ready", "draining"})
    EXPECT_EQ(ValueOf(page, "minke:members", {{"role", "expert"}, {"state", state}}), 1);
  EXPECT_EQ(ValueOf(page, "minke:members", {{"role", "gateway"}, {"state", "ready"}}), 0);
  EXPECT_EQ(
      ValueOf(
          page, "minke:member_info",
          {{"server", "0000000000000002"}, {"role", "expert"}, {"address", "10.0.0.1:7000"}, {"host", ""}}),
      1);
}

}  // namespace
}  // namespace minke::router
