#include "libs/kernels/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"

namespace minke::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// The driver is reached through the runtime, so that programs start on machines without one.
absl::StatusOr<EncodeTiled> FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  MK_CUDA_RETURN_IF_ERROR(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                           cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    return absl::FailedPreconditionError("the driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

absl::StatusOr<CUtensorMap> MakeTensorMap(const void* data, std::span<const uint64_t> dims,
                                          std::span<const uint64_t> strides_bytes,
                                          std::span<const uint32_t> box) {
  static const absl::StatusOr<EncodeTiled> encode = FindEncodeTiled();
  if (!encode.ok()) return encode.status();
  const uint32_t ones[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = (*encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<uint32_t>(dims.size()), const_cast<void*>(data),
      dims.data(), strides_bytes.data(), box.data(), ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return absl::InvalidArgumentError(
        absl::StrCat("cuTensorMapEncodeTiled: error ", static_cast<int>(result)));
  }
  return map;
}

}  // namespace minke::cuda
