// CUDA's return codes as absl::Status. For files of this folder only.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace minke::cuda {

absl::Status ToStatus(cudaError_t code, const char* call);

}  // namespace minke::cuda

#define MK_CUDA_RETURN_IF_ERROR(call)                                           \
  do {                                                                          \
    const cudaError_t mk_code = (call);                                         \
    if (mk_code != cudaSuccess) return ::minke::cuda::ToStatus(mk_code, #call); \
  } while (false)
