// Of a build without CUDA.
#include "libs/gpu_rows/gpu_rows.h"

namespace minke {
namespace {

absl::Status Missing() { return absl::FailedPreconditionError("this build has no CUDA backend"); }

}  // namespace

absl::StatusOr<std::unique_ptr<transport::RowMemory>> MakeGpuRowMemory(int64_t, int32_t, int32_t) {
  return Missing();
}

absl::StatusOr<std::unique_ptr<RowCombiner>> MakeGpuRowCombiner(int64_t, int64_t, int64_t) {
  return Missing();
}

}  // namespace minke
