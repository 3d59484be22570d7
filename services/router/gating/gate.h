// The gate of every MoE layer: which experts a row goes to, and with what weight. Linked into the router
// service, and into the attention node for --routing=local.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/model/checkpoint.h"

namespace minke::router {

// One row's choice. kRejected rows have non-finite scores and no experts.
enum class GateResult : uint8_t { kRouted, kRejected };

class Gate {
 public:
  explicit Gate(const ModelConfig& config) : config_(config) {}  // of no layer
  // Reads mlp.gate.weight of every MoE layer. The checkpoint must outlive nothing: weights are packed.
  static absl::StatusOr<Gate> Load(const Checkpoint& checkpoint, Precision precision, ThreadPool& pool);

  const ModelConfig& config() const { return config_; }
  bool HasLayer(int32_t layer) const { return layers_.contains(layer); }

  // Routes rows [rows, hidden] Act. experts [rows, k] ascending, weights [rows, k], results [rows].
  // `row_begin` is the index of the first row in its exchange (only a test's override looks at it).
  // REQUIRES: HasLayer(layer). Thread-compatible (owns scratch).
  void Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
             float* weights, GateResult* results, ThreadPool& pool);

  // Softmax scores [rows, experts] of the last call of Route, until the next one. Not a number in rejected
  // rows.
  const float* scores() const { return scores_.data(); }

  // For parity tests, where a near-tie would make two precisions route differently: forces the experts of
  // (layer, row); the weights still come from this gate's scores. Returns false to leave the choice to the
  // gate.
  using Override = std::function<bool(int32_t layer, uint32_t row, std::span<uint16_t> experts)>;
  void SetOverrideForTest(Override override) { override_ = std::move(override); }

 private:
  ModelConfig config_;
  std::map<int32_t, kernels::PackedMatrix> layers_;
  kernels::Scratch<float> logits_, scores_;
  Override override_;
};

}  // namespace minke::router
