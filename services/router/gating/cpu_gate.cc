#include "services/router/gating/cpu_gate.h"

#include <algorithm>

#include "libs/base/status.h"
#include "libs/kernels/cpu/top_k.h"

namespace minke::router {

absl::StatusOr<std::unique_ptr<Gate>> CpuGate::Load(const Checkpoint& checkpoint, Precision precision,
                                                    ThreadPool& pool) {
  auto gate = std::make_unique<CpuGate>(checkpoint.config());
  const ModelConfig& c = gate->config_;
  const int64_t shape[] = {c.n_routed_experts, c.hidden_size};
  for (const int32_t layer : c.MoeLayers()) {
    MK_ASSIGN_OR_RETURN(const TensorView view,
                        checkpoint.Find(LayerPrefix(layer) + "mlp.gate.weight", shape));
    gate->layers_.emplace(layer, kernels::PackedMatrix::Pack(precision, view, pool));
    checkpoint.Release(view);
  }
  return gate;
}

void CpuGate::Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
                    float* weights, GateResult* results, ThreadPool& pool) {
  const int64_t n = config_.n_routed_experts, k = config_.num_experts_per_tok;
  float* logits = logits_.Resize(rows * n);
  float* scores = scores_.Resize(rows * n);
  kernels::MatMul(layers_.at(layer), x, config_.hidden_size, rows, logits, n, pool);
  constexpr int64_t kGrain = 16;  // about 16 µs of top-k
  pool.ParallelFor((rows + kGrain - 1) / kGrain, [&](int64_t task) {
    for (int64_t i = task * kGrain; i < std::min(rows, (task + 1) * kGrain); ++i) {
      const std::span<uint16_t> row_experts(experts + i * k, k);
      absl::Status status;
      if (override_ && override_(layer, row_begin + static_cast<uint32_t>(i), row_experts)) {
        status = kernels::WeighExperts(config_, logits + i * n, scores + i * n, row_experts.data(),
                                       weights + i * k);
      } else {
        status =
            kernels::RouteToken(config_, logits + i * n, scores + i * n, row_experts.data(), weights + i * k);
      }
      results[i] = status.ok() ? GateResult::kRouted : GateResult::kRejected;
    }
  });
}

}  // namespace minke::router
