// NCCL's functions, found in its library at run time. For files of this folder only.
#pragma once

#include <nccl.h>

#include "absl/status/statusor.h"

namespace minke {

struct NcclLibrary {
  decltype(&::ncclGetErrorString) GetErrorString;
  decltype(&::ncclGetUniqueId) GetUniqueId;
  decltype(&::ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&::ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&::ncclCommFinalize) CommFinalize;
  decltype(&::ncclCommDestroy) CommDestroy;
  decltype(&::ncclCommAbort) CommAbort;
  decltype(&::ncclAllReduce) AllReduce;
  decltype(&::ncclBroadcast) Broadcast;

  // Loads it once per process. FAILED_PRECONDITION naming what was looked for.
  static absl::StatusOr<const NcclLibrary*> Get();
};

}  // namespace minke
