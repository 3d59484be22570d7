#include "services/router/gating/gate.h"

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "services/router/gating/cpu_gate.h"
#if MK_HAVE_CUDA
#include "services/router/gating/cuda_gate.h"
#endif

namespace minke::router {

void Gate::RouteDeviceRows(int32_t, uint32_t, const std::byte*, int64_t, uint16_t*, float*, GateResult*,
                           ThreadPool&) {
  MK_CHECK(!"a gate without a device was given rows on one");
}

absl::StatusOr<std::unique_ptr<Gate>> LoadGate(const Checkpoint& checkpoint, Precision precision,
                                               Device device, int64_t rows_max, ThreadPool& pool) {
  switch (device) {
    case Device::kCpu:
      return CpuGate::Load(checkpoint, precision, pool);
    case Device::kCuda:
      if (precision != Precision::kBF16)
        return absl::InvalidArgumentError("--device: expected cpu with --precision=exact, found cuda");
#if MK_HAVE_CUDA
      return CudaGate::Load(checkpoint, rows_max);
#else
      (void)rows_max;
      return absl::FailedPreconditionError("the gate on a GPU: this build has no CUDA backend");
#endif
  }
  return absl::InternalError("device");
}

absl::StatusOr<std::unique_ptr<Gate>> LoadGateOrCpus(std::string_view component, const Checkpoint& checkpoint,
                                                     Precision precision, Device device, int64_t rows_max,
                                                     ThreadPool& pool) {
  auto gate = LoadGate(checkpoint, precision, device, rows_max, pool);
  if (gate.ok() || device == Device::kCpu) return gate;
  log::Warning(component, StrCat("the gate is on the CPU: ", gate.status().message()));
  return LoadGate(checkpoint, precision, Device::kCpu, rows_max, pool);
}

}  // namespace minke::router
