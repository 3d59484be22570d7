// Gives this node's weights to new nodes, one at a time, beside serving. Who may have them is decided here;
// how they go is the model's (AttentionModel::GiveWeights).
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "libs/base/mutex.h"

namespace minke::attention {

// What both sides must agree on.
struct WeightsIdentity {
  std::string model_fingerprint;
  std::string precision;
  uint64_t plan_checksum = 0;  // of the tensors that go; 0: this node has none to give
};

// Thread-safe.
class WeightGiver {
 public:
  using NewGroup = std::function<absl::StatusOr<std::string>()>;
  // Joins the group as its first rank and sends everything. Has a deadline of its own, and gives up when
  // `stop` is set.
  using Give = std::function<absl::Status(const std::string& group_id, const std::atomic<bool>& stop)>;
  WeightGiver(WeightsIdentity self, NewGroup new_group, Give give)
      : self_(std::move(self)), new_group_(std::move(new_group)), give_(std::move(give)) {}
  ~WeightGiver();  // ends a transfer under way

  // Begins a transfer on a thread of its own and returns the group's id for the receiver.
  // FAILED_PRECONDITION naming what is wanted and what is here; UNAVAILABLE while another transfer lasts.
  absl::StatusOr<std::string> Offer(const WeightsIdentity& wanted);

 private:
  const WeightsIdentity self_;
  const NewGroup new_group_;
  const Give give_;
  std::atomic<bool> stop_{false};
  Mutex mutex_;
  bool giving_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_ ABSL_GUARDED_BY(mutex_);  // of the last transfer
};

}  // namespace minke::attention
