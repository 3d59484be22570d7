#include "services/router/gating/cuda_gate.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/cuda_model/weights.h"
#include "libs/kernels/cpu/top_k.h"

namespace minke::router {
namespace {

constexpr int64_t kAlignment = 256;  // of parts of a buffer: what any kernel may want
int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

CudaGate::Layout::Layout(const ModelConfig& config, int64_t rows) {
  const int64_t choices = rows * config.num_experts_per_tok * 4;
  experts = 0;
  logits = Aligned(choices);
  status = logits + Aligned(rows * config.n_routed_experts * 4);
  downloaded = status + rows;
  weights = Aligned(downloaded);
  bytes = weights + choices;
}

absl::StatusOr<std::unique_ptr<Gate>> CudaGate::Load(const Checkpoint& checkpoint, int64_t rows_max) {
  const ModelConfig& c = checkpoint.config();
  MK_RETURN_IF_ERROR(cuda::DeviceCount().status());
  const bool limited = c.topk_method == TopkMethod::kGroupLimitedGreedy;
  MK_ASSIGN_OR_RETURN(cuda::Gate kernel,
                      cuda::Gate::Create({.experts = c.n_routed_experts,
                                          .hidden = c.hidden_size,
                                          .k = c.num_experts_per_tok,
                                          .groups = limited ? c.n_group : 1,
                                          .topk_groups = limited ? c.topk_group : 1,
                                          .scale = static_cast<float>(c.routed_scaling_factor),
                                          .normalise = c.norm_topk_prob,
                                          .rows_max = rows_max}));
  MK_ASSIGN_OR_RETURN(cuda::Stream stream, cuda::Stream::Create());
  std::unique_ptr<CudaGate> gate(new CudaGate(c, rows_max, std::move(stream), std::move(kernel)));
  MK_ASSIGN_OR_RETURN(cuda_model::CheckpointSource source, cuda_model::CheckpointSource::Create(checkpoint));
  for (const int32_t layer : c.MoeLayers()) {
    MK_ASSIGN_OR_RETURN(cuda::DeviceBuffer weights, cuda_model::LoadGate(c, layer, source, gate->stream_));
    gate->layers_.emplace(layer, std::move(weights));
  }
  MK_RETURN_IF_ERROR(source.Finish(gate->stream_));
  const int64_t x_bytes = rows_max * c.hidden_size * 2, out_bytes = Layout(c, rows_max).bytes;
  MK_ASSIGN_OR_RETURN(gate->x_, cuda::DeviceBuffer::Allocate(x_bytes));
  MK_ASSIGN_OR_RETURN(gate->out_, cuda::DeviceBuffer::Allocate(out_bytes));
  MK_ASSIGN_OR_RETURN(gate->x_host_, cuda::PinnedBuffer::Allocate(x_bytes));
  MK_ASSIGN_OR_RETURN(gate->out_host_, cuda::PinnedBuffer::Allocate(out_bytes));
  return gate;
}

absl::Status CudaGate::Run(int32_t layer, const std::byte* x, bool on_device, int64_t rows) {
  if (rows > rows_max_) {
    return absl::InvalidArgumentError(StrCat("gate: expected at most ", rows_max_, " rows, found ", rows));
  }
  if (!on_device) {
    const int64_t bytes = rows * config_.hidden_size * 2;
    std::memcpy(x_host_.as(), x, bytes);
    MK_RETURN_IF_ERROR(x_.Upload(x_host_.as(), bytes, stream_));
    x = x_.as<std::byte>();
  }
  const Layout layout(config_, rows);
  std::byte* const out = out_.as<std::byte>();
  cuda::GateArgs args;
  args.x = reinterpret_cast<const bf16*>(x);
  args.w = layers_.at(layer).as<bf16>();
  args.rows = rows;
  args.experts = reinterpret_cast<int32_t*>(out + layout.experts);
  args.weights = reinterpret_cast<float*>(out + layout.weights);
  args.logits = reinterpret_cast<float*>(out + layout.logits);
  args.status = reinterpret_cast<uint8_t*>(out + layout.status);
  MK_RETURN_IF_ERROR(gate_.Run(args, stream_));
  MK_RETURN_IF_ERROR(out_.Download(out_host_.as(), layout.downloaded, stream_));
  return stream_.Synchronize();
}

void CudaGate::Finish(absl::Status status, int32_t layer, uint32_t row_begin, int64_t rows, uint16_t* experts,
                      float* weights, GateResult* results) {
  if (!status.ok()) {
    log::Error("router", StrCat("the device is lost, this process ends: ", status.message()));
    ::_exit(1);  // destructors would only fail on the device too
  }
  const int64_t k = config_.num_experts_per_tok, n = config_.n_routed_experts;
  const Layout layout(config_, rows);
  const std::byte* const out = out_host_.as<std::byte>();
  const auto* chosen = reinterpret_cast<const int32_t*>(out + layout.experts);
  const auto* logits = reinterpret_cast<const float*>(out + layout.logits);
  const auto* states = reinterpret_cast<const uint8_t*>(out + layout.status);
  scores_.resize(rows * n);
  for (int64_t i = 0; i < rows; ++i) {
    float* const row_scores = scores_.data() + i * n;
    if (states[i] != static_cast<uint8_t>(cuda::GateStatus::kRouted)) {
      results[i] = GateResult::kRejected;
      std::fill_n(row_scores, n, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    results[i] = GateResult::kRouted;
    for (int64_t e = 0; e < k; ++e) experts[i * k + e] = static_cast<uint16_t>(chosen[i * k + e]);
    const std::span<uint16_t> row_experts(experts + i * k, k);
    if (override_) override_(layer, row_begin + static_cast<uint32_t>(i), row_experts);
    const absl::Status weighed =
        kernels::WeighExperts(config_, logits + i * n, row_scores, row_experts.data(), weights + i * k);
    MK_CHECK(weighed.ok());  // the device has seen that they are finite
  }
}

void CudaGate::Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
                     float* weights, GateResult* results, ThreadPool& /*pool*/) {
  Finish(Run(layer, x, /*on_device=*/false, rows), layer, row_begin, rows, experts, weights, results);
}

void CudaGate::RouteDeviceRows(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows,
                               uint16_t* experts, float* weights, GateResult* results, ThreadPool& /*pool*/) {
  Finish(Run(layer, x, /*on_device=*/true, rows), layer, row_begin, rows, experts, weights, results);
}

}  // namespace minke::router
