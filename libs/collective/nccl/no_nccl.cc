// Of a build without nccl.h.
#include "libs/collective/nccl/nccl_group.h"

namespace minke {
namespace {

absl::Status Missing() {
  return absl::FailedPreconditionError(
      "this build has no NCCL: nccl.h was not found beside the CUDA toolkit");
}

}  // namespace

absl::StatusOr<std::string> NewNcclGroupId() { return Missing(); }

absl::StatusOr<std::unique_ptr<DeviceCollective>> JoinNcclGroup(const std::string&, int, int, absl::Duration,
                                                                const std::atomic<bool>*) {
  return Missing();
}

absl::StatusOr<std::vector<std::unique_ptr<DeviceCollective>>> MakeNcclGroup(int, absl::Duration) {
  return Missing();
}

}  // namespace minke
