#include "libs/cuda_model/weight_transfer.h"

#include "libs/base/status.h"

namespace minke::cuda_model {
namespace {

constexpr int kGiver = 0;
// Broadcasts under way before the sender looks whether the receiver is still there: no more than this is lost
// time when it is not, and what is queued is a fraction of a model.
constexpr size_t kTensorsPerWait = 64;

}  // namespace

absl::Status SendWeights(const std::vector<PlannedTensor>& plan, const AttentionWeights& weights,
                         DeviceCollective& group, const Stream& stream) {
  for (size_t i = 0; i < plan.size(); ++i) {
    char* const from = plan[i].BufferIn(weights).as<char>();
    MK_RETURN_IF_ERROR(
        Annotate(group.Broadcast(from + plan[i].offset, plan[i].bytes, kGiver, stream), plan[i].name));
    if ((i + 1) % kTensorsPerWait == 0) MK_RETURN_IF_ERROR(group.Wait(stream));
  }
  return group.Wait(stream);
}

absl::Status BroadcastSource::Receive(const std::string& name, int64_t bytes, DeviceBuffer& to,
                                      int64_t offset, const Stream& stream) {
  if (next_ == plan_.size() || plan_[next_].name != name || plan_[next_].bytes != bytes) {
    return absl::InternalError(StrCat("weights from another node: ", name, ", ", bytes,
                                      " bytes, is read where ",
                                      next_ == plan_.size() ? "nothing more" : plan_[next_].name, ", ",
                                      next_ == plan_.size() ? 0 : plan_[next_].bytes, " bytes, comes"));
  }
  ++next_;
  MK_RETURN_IF_ERROR(Annotate(group_.Broadcast(to.as<char>() + offset, bytes, kGiver, stream), name));
  return next_ % kTensorsPerWait == 0 ? group_.Wait(stream) : absl::OkStatus();
}

absl::Status BroadcastSource::ReadPart(const std::string& name, std::span<const int64_t>,
                                       const MatrixPart& part, DeviceBuffer& to, int64_t offset,
                                       const Stream& stream) {
  return Receive(name, part.rows * part.columns * 2, to, offset, stream);
}

absl::Status BroadcastSource::ReadF32(const std::string& name, int64_t count, DeviceBuffer& to,
                                      const Stream& stream) {
  return Receive(name, count * 4, to, 0, stream);
}

absl::Status BroadcastSource::Finish(const Stream& stream) {
  if (next_ != plan_.size()) {
    return absl::InternalError(
        StrCat("weights from another node: ", next_, " of ", plan_.size(), " tensors were read"));
  }
  return group_.Wait(stream);
}

}  // namespace minke::cuda_model
