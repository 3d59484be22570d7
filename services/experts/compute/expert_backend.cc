#include "services/experts/compute/expert_backend.h"

#include <unistd.h>

#include "libs/base/hash.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "services/experts/compute/cpu_backend.h"
#if MK_HAVE_CUDA
#include "services/experts/compute/cuda_backend.h"
#endif

namespace minke::experts {

absl::Status CheckBackendOptions(const BackendOptions& options) {
  switch (options.device) {
    case Device::kCpu:
      if (options.format != ExpertsFormat::kBF16) {
        return absl::InvalidArgumentError(
            "--experts-format: expected bf16 on a CPU, found fp8, which only a GPU computes with");
      }
      return absl::OkStatus();
    case Device::kCuda:
      if (options.precision != Precision::kBF16) {
        return absl::InvalidArgumentError("--device: expected cpu with --precision=exact, found cuda");
      }
      return absl::OkStatus();
  }
  return absl::InternalError("device");
}

absl::StatusOr<std::unique_ptr<ExpertBackend>> MakeBackend(const Checkpoint& checkpoint,
                                                           const BackendOptions& options, ThreadPool& pool,
                                                           ThreadPool& load_pool) {
  MK_RETURN_IF_ERROR(CheckBackendOptions(options));
  if (options.rows != nullptr && options.rows->on_gpu() != (options.device == Device::kCuda)) {
    return absl::FailedPreconditionError(
        StrCat("row memory ", options.rows->on_gpu() ? "on a GPU" : "of the host",
               " is none for experts on a ", options.device == Device::kCuda ? "GPU" : "CPU"));
  }
  switch (options.device) {
    case Device::kCpu:
      return std::make_unique<CpuBackend>(checkpoint, options.precision, pool, load_pool);
    case Device::kCuda:
#if MK_HAVE_CUDA
      return CudaBackend::Create(checkpoint, options.format, pool, options.rows);
#else
      return absl::FailedPreconditionError("experts on a GPU: this build has no CUDA backend");
#endif
  }
  return absl::InternalError("device");
}

uint64_t LayoutName(std::string_view packing, const ModelConfig& config, UnitId unit) {
  return Fnv1a(StrCat(packing, " experts=", config.GroupExperts(static_cast<int32_t>(unit.group)).size(),
                      " hidden=", config.hidden_size, " inner=", config.moe_intermediate_size));
}

void DeviceLost(const absl::Status& status) {
  log::Error("experts", StrCat("the device is lost, this server ends: ", status.message()));
  ::_exit(1);  // destructors would only fail on the device too
}

}  // namespace minke::experts
