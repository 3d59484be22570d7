// What an expert server computes on. The engine and the loader know units, rows and partial sums; a backend
// knows where weights lie and what multiplies them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"
#include "libs/base/device.h"
#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/model/checkpoint.h"
#include "libs/transport/row_memory.h"
#include "services/experts/compute/group_rows.h"

namespace minke::experts {

// Two threads: the loader calls LoadUnit and BuildUnit, the engine Run, at the same time; neither waits for
// the other.
class ExpertBackend {
 public:
  virtual ~ExpertBackend() = default;

  // Reads and packs the unit's experts, touching only their bytes of the checkpoint. What is returned is for
  // this backend's Run. RESOURCE_EXHAUSTED if it does not fit the device, naming bytes needed and free.
  // INTERNAL: the device is lost, see DeviceLost.
  virtual absl::StatusOr<std::shared_ptr<const UnitWeights>> LoadUnit(UnitId unit) = 0;

  // The same from the packed form of another server whose layout of the unit has the same name.
  virtual absl::StatusOr<std::unique_ptr<UnitBuilder>> BuildUnit(UnitId unit) = 0;
  // Names how this backend packs the unit: device, format, shape. Any thread.
  virtual uint64_t UnitLayout(UnitId unit) const = 0;

  // One launch. For every group row: the sum over its pairs, in expert order, of weight x expert(row), in
  // f32, rounded to the activation dtype at outs[i]. finite[i] is 0 where the sum has a NaN or an
  // infinity, else 1. Any error: the device is lost. REQUIRES: every unit of `rows` is in `units`; `rows` are
  // as SplitByGroup made them.
  virtual absl::Status Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                           std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                           std::span<uint8_t> finite) = 0;
};

// How routed experts lie in a GPU's memory (docs/gpu.md). The CPU knows kBF16 only: what --precision says.
enum class ExpertsFormat : uint8_t { kBF16, kFP8 };

struct BackendOptions {
  Device device = Device::kCpu;
  ExpertsFormat format = ExpertsFormat::kBF16;
  Precision precision = Precision::kBF16;
  // Row memory in which rows of messages may lie and sums may be wanted: the transport's. Null: neither is.
  // Must outlive the backend.
  transport::RowMemory* rows = nullptr;
};

// INVALID_ARGUMENT, naming the flag, for a format or a precision that the device cannot have.
absl::Status CheckBackendOptions(const BackendOptions& options);

// `checkpoint` and the pools must outlive the backend; `pool` is for launches, `load_pool` for loading.
// FAILED_PRECONDITION for a GPU in a build without CUDA, and for row memory that is not on the device;
// RESOURCE_EXHAUSTED if its workspace does not fit, or its rows the row memory.
absl::StatusOr<std::unique_ptr<ExpertBackend>> MakeBackend(const Checkpoint& checkpoint,
                                                           const BackendOptions& options, ThreadPool& pool,
                                                           ThreadPool& load_pool);

// The name of a layout: `packing` (raise its number when the packed form changes) and the unit's shape, as
// one number.
uint64_t LayoutName(std::string_view packing, const ModelConfig& config, UnitId unit);

// A GPU's errors stay: every later call of the process fails too. One log line, and the process ends with
// code 1, so that the cluster gives its work to others (docs/protocol.md).
[[noreturn]] void DeviceLost(const absl::Status& status);

}  // namespace minke::experts
