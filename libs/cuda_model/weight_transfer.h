// An attention node's weights from the GPU of one that has them to the GPU of a new one: tensor by tensor in
// the order of PlanWeights, each a broadcast from rank 0 of a group of two.
#pragma once

#include <vector>

#include "libs/collective/device_collective.h"
#include "libs/cuda_model/weight_plan.h"

namespace minke::cuda_model {

// The giver's end, rank 0. Reads the weights in stream order, on any thread; others may go on reading them.
// Returns when all is sent.
absl::Status SendWeights(const std::vector<PlannedTensor>& plan, const AttentionWeights& weights,
                         DeviceCollective& group, const Stream& stream);

// The receiver's end: what the giver sends, in the place of a checkpoint. Tensors can be read in the order of
// the plan only; INTERNAL otherwise, naming both.
class BroadcastSource final : public WeightSource {
 public:
  // Both borrowed.
  BroadcastSource(const std::vector<PlannedTensor>& plan, DeviceCollective& group)
      : plan_(plan), group_(group) {}
  absl::Status ReadPart(const std::string& name, std::span<const int64_t> shape, const MatrixPart& part,
                        DeviceBuffer& to, int64_t offset, const Stream& stream) override;
  absl::Status ReadF32(const std::string& name, int64_t count, DeviceBuffer& to,
                       const Stream& stream) override;
  // INTERNAL if the plan is not at its end.
  absl::Status Finish(const Stream& stream) override;

 private:
  absl::Status Receive(const std::string& name, int64_t bytes, DeviceBuffer& to, int64_t offset,
                       const Stream& stream);

  const std::vector<PlannedTensor>& plan_;
  DeviceCollective& group_;
  size_t next_ = 0;
};

}  // namespace minke::cuda_model
