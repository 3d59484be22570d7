#include "bench/gpu/ceilings.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "bench/gpu/fill.h"
#include "bench/gpu/measure.h"

namespace minke::bench {

absl::StatusOr<double> CopyGBPerSecond(const cuda::Stream& stream) {
  constexpr int64_t kBytes = int64_t{2} << 30;
  absl::StatusOr<cuda::DeviceBuffer> from = cuda::DeviceBuffer::Allocate(kBytes);
  if (!from.ok()) return from.status();
  absl::StatusOr<cuda::DeviceBuffer> to = cuda::DeviceBuffer::Allocate(kBytes);
  if (!to.ok()) return to.status();
  if (absl::Status s = FillNormal(from->as<bf16>(), kBytes / 2, 1, 1, stream); !s.ok()) return s;
  absl::StatusOr<double> ms = MedianMilliseconds(1, stream, [&](int) {
    const cudaError_t error =
        cudaMemcpyAsync(to->as(), from->as(), kBytes, cudaMemcpyDeviceToDevice, stream.handle());
    return error == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(error));
  });
  if (!ms.ok()) return ms.status();
  return 2.0 * kBytes / *ms * 1e-6;
}

absl::StatusOr<double> ProductTFlopPerSecond(const cuda::Stream& stream) {
  constexpr int64_t kSize = 8192, kElements = kSize * kSize;
  constexpr int kSets = 2;
  constexpr size_t kWorkspace = 64 << 20;
  absl::StatusOr<cuda::DeviceBuffer> a = cuda::DeviceBuffer::Allocate(kSets * kElements * 2);
  absl::StatusOr<cuda::DeviceBuffer> b = cuda::DeviceBuffer::Allocate(kSets * kElements * 2);
  absl::StatusOr<cuda::DeviceBuffer> c = cuda::DeviceBuffer::Allocate(kElements * 2);
  absl::StatusOr<cuda::DeviceBuffer> workspace = cuda::DeviceBuffer::Allocate(kWorkspace);
  for (const auto* buffer : {&a, &b, &c, &workspace}) {
    if (!buffer->ok()) return buffer->status();
  }
  if (absl::Status s = FillNormal(a->as<bf16>(), kSets * kElements, 2, 1, stream); !s.ok()) return s;
  if (absl::Status s = FillNormal(b->as<bf16>(), kSets * kElements, 3, 1, stream); !s.ok()) return s;
  cublasLtHandle_t handle = nullptr;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS) return absl::InternalError("cublasLtCreate");
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t layout = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose));
  cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, kSize, kSize, kSize);
  cublasLtMatmulPreferenceCreate(&preference);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace,
                                       sizeof(kWorkspace));
  cublasLtMatmulAlgoGetHeuristic(handle, operation, layout, layout, layout, layout, preference, 1, &found,
                                 &count);
  absl::StatusOr<double> ms = absl::InternalError("cuBLASLt knows no algorithm");
  if (count == 1) {
    const float one = 1, zero = 0;
    ms = MedianMilliseconds(kSets, stream, [&](int set) {
      const cublasStatus_t status =
          cublasLtMatmul(handle, operation, &one, a->as<bf16>() + set * kElements, layout,
                         b->as<bf16>() + set * kElements, layout, &zero, c->as(), layout, c->as(), layout,
                         &found.algo, workspace->as(), kWorkspace, stream.handle());
      return status == CUBLAS_STATUS_SUCCESS
                 ? absl::OkStatus()
                 : absl::InternalError(absl::StrCat("cublasLtMatmul: ", int{status}));
    });
  }
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(operation);
  cublasLtDestroy(handle);
  if (!ms.ok()) return ms.status();
  return 2.0 * kSize * kSize * kSize / *ms * 1e-9;
}

}  // namespace minke::bench
