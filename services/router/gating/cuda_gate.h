// The gate on a GPU (libs/kernels/cuda/gate.h): rows that lie there are gated where they lie, others are
// uploaded. Only in builds with CUDA. All calls on one thread's current device, that of Load().
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/gate.h"
#include "libs/kernels/cuda/graph.h"
#include "services/router/gating/gate.h"

namespace minke::router {

class CudaGate final : public Gate {
 public:
  static absl::StatusOr<std::unique_ptr<Gate>> Load(const Checkpoint& checkpoint, int64_t rows_max);

  bool HasLayer(int32_t layer) const override { return layers_.contains(layer); }
  void Route(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
             float* weights, GateResult* results, ThreadPool& pool) override;
  bool takes_device_rows() const override { return true; }
  void RouteDeviceRows(int32_t layer, uint32_t row_begin, const std::byte* x, int64_t rows, uint16_t* experts,
                       float* weights, GateResult* results, ThreadPool& pool) override;
  const float* scores() const override { return scores_.data(); }

 private:
  // What a run gives back, one part behind the other in one buffer, so that one copy brings it: offsets of
  // experts i32 [rows, k], logits f32 [rows, experts], status [rows]. Scores and weights are the host's from
  // the logits, as the CPU's gate has them; behind what is copied are those of the kernel.
  struct Layout {
    Layout(const ModelConfig& config, int64_t rows);
    int64_t experts, logits, status, downloaded, weights, bytes;
  };

  CudaGate(const ModelConfig& config, int64_t rows_max, cuda::Stream stream, cuda::Gate gate)
      : Gate(config), rows_max_(rows_max), stream_(std::move(stream)), gate_(std::move(gate)) {}
  absl::Status Run(int32_t layer, const std::byte* x, bool on_device, int64_t rows);
  void Finish(absl::Status status, int32_t layer, uint32_t row_begin, int64_t rows, uint16_t* experts,
              float* weights, GateResult* results);

  const int64_t rows_max_;
  cuda::Stream stream_;
  cuda::Gate gate_;
  std::map<int32_t, cuda::DeviceBuffer> layers_;  // [experts, hidden] bf16
  cuda::DeviceBuffer x_, out_;
  cuda::PinnedBuffer x_host_, out_host_;
  std::vector<float> scores_;
};

}  // namespace minke::router
