#include "libs/registry/etcd_state.h"

#include <limits>

#include "gtest/gtest.h"

namespace minke::registry {
namespace {

using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

class ApplyPutTest : public ::testing::Test {
 protected:
  Learned Put(const std::string& key, const std::string& value) {
    return ApplyPut(keys_, {.key = key, .value = value, .create_revision = 3, .mod_revision = 5, .lease = 7},
                    state_, kept_);
  }
  const EtcdKeys keys_{"minke"};
  EtcdState state_;
  std::set<NodeId> kept_;
};

std::string Report(uint64_t id, uint32_t queued = 0) {
  MemberReport report;
  report.mutable_member()->set_node_id(id);
  report.mutable_load()->set_queued_rows(queued);
  return report.SerializeAsString();
}

TEST_F(ApplyPutTest, ValuesThatAreNoReportsDoNotCount) {
  const std::string key = keys_.Member(NodeId{5});
  for (const std::string& value : {std::string("\xff\xff"), std::string(), Report(6)}) {
    const Learned learned = Put(key, value);
    EXPECT_FALSE(learned.more || learned.loads);
  }
  for (const char* name : {"", "xyz", "0", "5 ", "123456789012345678901"})
    EXPECT_FALSE(Put(keys_.members + name, Report(5)).more) << name;
  EXPECT_TRUE(state_.members.empty());
}

TEST_F(ApplyPutTest, AMembersLoadAloneIsNoChangeOfTheView) {
  const std::string key = keys_.Member(NodeId{5});
  EXPECT_TRUE(Put(key, Report(5)).more);
  const Learned again = Put(key, Report(5, 12));
  EXPECT_FALSE(again.more);
  EXPECT_TRUE(again.loads);
  EXPECT_EQ(state_.members.at(NodeId{5}).load().queued_rows(), 12u);
  kept_.insert(NodeId{5});
  EXPECT_TRUE(Put(key, Report(5, 13)).more) << "it is back";
  EXPECT_TRUE(kept_.empty());
}

// Found by fuzzing: more weights than servers ended every process that read them.
TEST_F(ApplyPutTest, ARecordWhoseWeightsAreNotItsServersDoesNotCount) {
  PlacementRecord record;
  auto& unit = *record.add_placement();
  unit.add_node_ids(5);
  unit.add_weights(1);
  EXPECT_TRUE(Put(keys_.placement, record.SerializeAsString()).more);
  EXPECT_EQ(state_.record_revision, 5);
  const std::string sound = state_.record.SerializeAsString();
  unit.add_weights(1);
  EXPECT_FALSE(Put(keys_.placement, record.SerializeAsString()).more);
  unit.clear_weights();
  unit.add_weights(std::numeric_limits<float>::quiet_NaN());
  EXPECT_FALSE(Put(keys_.placement, record.SerializeAsString()).more);
  unit.set_weights(0, -1);
  EXPECT_FALSE(Put(keys_.placement, record.SerializeAsString()).more);
  EXPECT_FALSE(Put(keys_.placement, "\xff").more);
  EXPECT_EQ(state_.record.SerializeAsString(), sound) << "the last one stays";
  unit.clear_weights();
  EXPECT_TRUE(Put(keys_.placement, record.SerializeAsString()).more) << "none: all to the same replica";
}

TEST_F(ApplyPutTest, TheLeadersKey) {
  Put(keys_.leader, "00000000000000ff");
  EXPECT_EQ(state_.leader, NodeId{255});
  EXPECT_EQ(state_.leader_revision, 3);
  EXPECT_EQ(state_.leader_lease, 7);
  Put(keys_.leader, "not an id");
  EXPECT_EQ(state_.leader, NodeId{});
}

}  // namespace
}  // namespace minke::registry
