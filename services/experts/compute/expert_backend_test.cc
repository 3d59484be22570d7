#include "services/experts/compute/expert_backend.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"

namespace minke::experts {
namespace {

using testing::HasSubstr;

TEST(CheckBackendOptions, Fp8IsRefusedOnACpuInOneLine) {
  const absl::Status status = CheckBackendOptions({.device = Device::kCpu, .format = ExpertsFormat::kFP8});
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--experts-format"));
  EXPECT_EQ(status.message().find('\n'), status.message().npos);
}

TEST(CheckBackendOptions, AGpuDoesNotComputeExactly) {
  EXPECT_TRUE(absl::IsInvalidArgument(
      CheckBackendOptions({.device = Device::kCuda, .precision = Precision::kExact})));
  EXPECT_TRUE(CheckBackendOptions({.device = Device::kCuda, .format = ExpertsFormat::kFP8}).ok());
}

TEST(MakeBackend, AUnitThatIsNotInTheCheckpointIsAnErrorOfThatUnit) {
  const minke::testing_support::TempCheckpoint empty({});
  ThreadPool pool(1), load_pool(1);
  const auto backend = MakeBackend(empty.checkpoint(), {}, pool, load_pool);
  ASSERT_TRUE(backend.ok()) << backend.status();
  const auto unit = (*backend)->LoadUnit({1, 0});
  EXPECT_FALSE(unit.ok());
  EXPECT_FALSE(absl::IsInternal(unit.status())) << "would end the process";
}

#if !MK_HAVE_CUDA
TEST(MakeBackend, ABuildWithoutCudaSaysSo) {
  const minke::testing_support::TempCheckpoint empty({});
  ThreadPool pool(1), load_pool(1);
  const auto backend = MakeBackend(empty.checkpoint(), {.device = Device::kCuda}, pool, load_pool);
  EXPECT_TRUE(absl::IsFailedPrecondition(backend.status()));
  EXPECT_THAT(std::string(backend.status().message()), HasSubstr("no CUDA backend"));
}
#endif

TEST(DeviceLostDeathTest, EndsTheProcessWithOneLine) {
  EXPECT_EXIT(DeviceLost(absl::InternalError("cudaLaunchKernel: cudaErrorIllegalAddress")),
              testing::ExitedWithCode(1), "device is lost.*cudaErrorIllegalAddress");
}

}  // namespace
}  // namespace minke::experts
