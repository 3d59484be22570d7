#include "libs/collective/local_group.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke {
namespace {

// What the ranks share. Calls are short and follow each other closely, so ranks spin for each other before
// they sleep.
class Meeting {
 public:
  Meeting(int size, absl::Duration deadline) : size_(size), deadline_(deadline), buffers_(size) {}
  int size() const { return size_; }
  std::vector<void*>& buffers() { return buffers_; }

  // Returns when all ranks have come.
  absl::Status Wait() {
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      return absl::OkStatus();
    }
    const absl::Time end = absl::Now() + deadline_;
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) continue;
      std::this_thread::yield();
      if (spins % kSpins == 0 && absl::Now() > end)
        return absl::DeadlineExceededError(StrCat("some of ", size_, " ranks did not come"));
    }
    return absl::OkStatus();
  }

 private:
  static constexpr int kSpins = 1000;
  const int size_;
  const absl::Duration deadline_;
  std::vector<void*> buffers_;  // each rank's, of the call under way
  std::atomic<int> arrived_{0};
  std::atomic<uint64_t> round_{0};
};

class LocalCollective final : public Collective {
 public:
  LocalCollective(std::shared_ptr<Meeting> meeting, int rank) : meeting_(std::move(meeting)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return meeting_->size(); }

  absl::Status AllReduceSum(std::span<float> values) override {
    meeting_->buffers()[rank_] = values.data();
    MK_RETURN_IF_ERROR(meeting_->Wait());
    // Each rank adds up its part of all ranks' values and hands the sums out; nobody else touches that part.
    const size_t begin = values.size() * rank_ / size(), end = values.size() * (rank_ + 1) / size();
    float* first = static_cast<float*>(meeting_->buffers()[0]);
    for (int other = 1; other < size(); ++other) {
      const float* theirs = static_cast<const float*>(meeting_->buffers()[other]);
      for (size_t i = begin; i < end; ++i) first[i] += theirs[i];
    }
    for (int other = 1; other < size(); ++other) {
      std::copy(first + begin, first + end, static_cast<float*>(meeting_->buffers()[other]) + begin);
    }
    return meeting_->Wait();
  }

  absl::Status Broadcast(std::span<std::byte> bytes, int root) override {
    meeting_->buffers()[rank_] = bytes.data();
    MK_RETURN_IF_ERROR(meeting_->Wait());
    if (rank_ != root) std::memcpy(bytes.data(), meeting_->buffers()[root], bytes.size());
    return meeting_->Wait();
  }

 private:
  const std::shared_ptr<Meeting> meeting_;  // shared by the ranks
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Collective>> MakeLocalGroup(int size, absl::Duration deadline) {
  const auto meeting = std::make_shared<Meeting>(size, deadline);
  std::vector<std::unique_ptr<Collective>> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(std::make_unique<LocalCollective>(meeting, rank));
  return ranks;
}

}  // namespace minke
