// The gate on the CPU.
#pragma once

#include <map>
#include <memory>

#include "libs/kernels/cpu/matmul.h"
#include "services/router/gating/gate.h"

namespace minke::router {

class CpuGate final : public Gate {
 public:
  explicit CpuGate(const ModelConfig& config) : Gate(config) {}  // of no layer
  // The checkpoint must outlive nothing: weights are packed.
  static absl::StatusOr<std::unique_ptr<Gate>> Load(const Checkpoint& checkpoint, Precision precision,
                                                    ThreadPool& pool);

  bool HasLayer(int32_t layer) const override { return layers_.contains(layer); }
  void Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
             float* weights, GateResult* results, ThreadPool& pool) override;
  const float* scores() const override { return scores_.data(); }

 private:
  std::map<int32_t, kernels::PackedMatrix> layers_;
  kernels::Scratch<float> logits_, scores_;
};

}  // namespace minke::router
