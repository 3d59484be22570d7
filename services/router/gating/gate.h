// The gate of every MoE layer: which experts a row goes to, and with what weight. Linked into the router
// service, and into the attention node for --routing=local.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "absl/status/statusor.h"
#include "libs/base/device.h"
#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/model/checkpoint.h"

namespace minke::router {

// One row's choice. kRejected rows have non-finite scores and no experts.
enum class GateResult : uint8_t { kRouted, kRejected };

// Thread-compatible (owns scratch).
class Gate {
 public:
  virtual ~Gate() = default;
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  const ModelConfig& config() const { return config_; }
  virtual bool HasLayer(int32_t layer) const = 0;

  // Routes rows [rows, hidden] Act in host memory. experts [rows, k] ascending, weights [rows, k], results
  // [rows], all in host memory. `row_begin` is the index of the first row in its exchange (only a test's
  // override looks at it). REQUIRES: HasLayer(layer). A GPU that fails ends the process.
  virtual void Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
                     float* weights, GateResult* results, ThreadPool& pool) = 0;
  // Whether rows may lie in the memory of a device, and the same for such rows. They must be complete; the
  // call returns when the choice is there.
  virtual bool takes_device_rows() const { return false; }
  virtual void RouteDeviceRows(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows,
                               uint16_t* experts, float* weights, GateResult* results, ThreadPool& pool);

  // Softmax scores [rows, experts] of the last call of either, until the next one. Not a number in rejected
  // rows.
  virtual const float* scores() const = 0;

  // For parity tests, where a near-tie would make two precisions route differently: forces the experts of
  // (layer, row); the weights still come from this gate's scores. Returns false to leave the choice to the
  // gate.
  using Override = std::function<bool(int32_t layer, uint32_t row, std::span<uint16_t> experts)>;
  void SetOverrideForTest(Override override) { override_ = std::move(override); }

 protected:
  explicit Gate(const ModelConfig& config) : config_(config) {}

  const ModelConfig config_;
  Override override_;
};

// Reads mlp.gate.weight of every MoE layer, for at most `rows_max` rows a call. The checkpoint must outlive
// nothing. FAILED_PRECONDITION: a GPU, but this build or this machine has none. INVALID_ARGUMENT: a GPU that
// should compute exactly, or a model it cannot.
absl::StatusOr<std::unique_ptr<Gate>> LoadGate(const Checkpoint& checkpoint, Precision precision,
                                               Device device, int64_t rows_max, ThreadPool& pool);
// The same, but the CPU's, after a warning of `component` that says why, where it cannot be on the GPU.
absl::StatusOr<std::unique_ptr<Gate>> LoadGateOrCpus(std::string_view component, const Checkpoint& checkpoint,
                                                     Precision precision, Device device, int64_t rows_max,
                                                     ThreadPool& pool);

}  // namespace minke::router
