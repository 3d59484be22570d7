// Units that expert servers take from one another instead of the checkpoint: the same bits afterwards.
#include <cstdint>
#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/support/golden.h"
#include "tests/support/local_cluster.h"

namespace minke {
namespace {

using experts::LoadFrom;
using experts::UnitSource;
using testing_support::ClusterOptions;
using testing_support::Generation;
using testing_support::Golden;
using testing_support::Greedy;
using testing_support::LocalCluster;

int64_t Loaded(LocalCluster& cluster, int expert, UnitSource source) {
  return static_cast<int64_t>(cluster.expert(expert).status().loaded[static_cast<size_t>(source)].units);
}

struct Case {
  const char* name;
  const char* model;
  Precision precision;
  bool ucx;
  double drop = 0;
};

class UnitTransfer : public testing::TestWithParam<Case> {
 protected:
  ClusterOptions Options(LoadFrom load_from) {
    ClusterOptions options{.checkpoint = Golden::Get(GetParam().model).checkpoint};
    options.precision = GetParam().precision;
    options.experts = 1;
    options.ucx = GetParam().ucx;
    options.load_from = load_from;
    if (GetParam().drop > 0) {
      options.faults =
          transport::FaultOptions{.drop_probability = GetParam().drop,
                                  .duplicate_probability = 0.1,
                                  .kinds = uint64_t{7} << static_cast<int>(wire::Kind::kUnitRequest)};
    }
    return options;
  }
  Generation Ask(LocalCluster& cluster) {
    return cluster.Run(Greedy(Golden::Get(GetParam().model).input_ids, 12, true));
  }
  // The first server's units go to the second, and it leaves. Units loaded by the second, from `source`.
  void MoveAll(LocalCluster& cluster) {
    cluster.AddExpert();
    absl::Status drained;
    for (int i = 0; i < 1000; ++i) {  // until the first has heard of the second
      drained = cluster.expert(0).Drain(absl::Seconds(60), [] { return false; });
      if (!absl::IsFailedPrecondition(drained)) break;
      absl::SleepFor(absl::Milliseconds(10));
    }
    ASSERT_TRUE(drained.ok()) << drained;
    cluster.StopExpert(0);
  }
};

INSTANTIATE_TEST_SUITE_P(Cases, UnitTransfer,
                         testing::Values(Case{"V2Exact", "v2", Precision::kExact, false},
                                         Case{"LiteBf16", "lite", Precision::kBF16, false},
                                         Case{"PlainExactUcx", "plain", Precision::kExact, true},
                                         Case{"LossyExact", "lite", Precision::kExact, false, 0.05}),
                         [](const auto& info) { return info.param.name; });

TEST_P(UnitTransfer, GivesTheSameBits) {
  LocalCluster cluster(Options(LoadFrom::kReplica));
  const Generation want = Ask(cluster);
  ASSERT_TRUE(want.error.ok()) << want.error;
  ASSERT_EQ(Loaded(cluster, 0, UnitSource::kReplica), 0);
  const int64_t units = Loaded(cluster, 0, UnitSource::kCheckpoint);
  MoveAll(cluster);
  EXPECT_EQ(Loaded(cluster, 1, UnitSource::kReplica), units);
  EXPECT_EQ(Loaded(cluster, 1, UnitSource::kCheckpoint), 0);
  const Generation got = Ask(cluster);
  EXPECT_TRUE(got.error.ok()) << got.error;
  EXPECT_EQ(got.tokens, want.tokens);
  EXPECT_EQ(got.logprobs, want.logprobs);
  EXPECT_EQ(got.prompt_logprobs, want.prompt_logprobs);
}

TEST_P(UnitTransfer, BySpeedBothAreTried) {
  LocalCluster cluster(Options(LoadFrom::kAuto));
  const Generation want = Ask(cluster);
  MoveAll(cluster);
  EXPECT_GT(Loaded(cluster, 1, UnitSource::kReplica), 0);
  EXPECT_GT(Loaded(cluster, 1, UnitSource::kCheckpoint), 0);
  EXPECT_EQ(Ask(cluster).logprobs, want.logprobs);
}

}  // namespace
}  // namespace minke
