// How many sequences the gateway holds at once, and what it has counted since it started. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "services/gateway/metrics/request_metrics.h"

namespace minke::gateway {

// Monotonic counts.
struct GatewayCounters {
  // context_length: of the model.
  explicit GatewayCounters(int64_t context_length = 163'840) : requests(context_length) {}

  std::atomic<uint64_t> http_requests{0};
  std::atomic<uint64_t> generations{0};            // admitted API requests
  std::atomic<uint64_t> generations_refused{0};    // 429
  std::atomic<uint64_t> generations_abandoned{0};  // the client left
  std::atomic<uint64_t> stream_errors{0};          // told inside a stream that had begun
  std::atomic<uint64_t> prompt_tokens{0};
  std::atomic<uint64_t> completion_tokens{0};
  std::atomic<uint64_t> resubmissions{0};  // sequences whose node was lost
  std::atomic<uint64_t> migrations{0};     // sequences whose node drained
  ResponseCounts responses;
  RequestMetrics requests;
};

class Admission {
 public:
  explicit Admission(int64_t sequences_max) : sequences_max_(sequences_max) {}

  // Room for some sequences, given back when destroyed.
  class Permit {
   public:
    Permit() = default;
    Permit(Permit&& other) noexcept
        : admission_(std::exchange(other.admission_, nullptr)),
          sequences_(std::exchange(other.sequences_, 0)) {}
    Permit& operator=(Permit&& other) noexcept {
      std::swap(admission_, other.admission_);
      std::swap(sequences_, other.sequences_);
      return *this;
    }
    ~Permit() {
      if (admission_ != nullptr) admission_->active_.fetch_sub(sequences_);
    }
    explicit operator bool() const { return admission_ != nullptr; }

   private:
    friend class Admission;
    Permit(Admission* admission, int64_t sequences) : admission_(admission), sequences_(sequences) {}
    Admission* admission_ = nullptr;
    int64_t sequences_ = 0;
  };

  // An empty permit if there is no room.
  Permit TryAcquire(int64_t sequences) {
    if (active_.fetch_add(sequences) + sequences <= sequences_max_) return Permit(this, sequences);
    active_.fetch_sub(sequences);
    return Permit();
  }
  int64_t active() const { return active_.load(); }
  int64_t sequences_max() const { return sequences_max_; }

 private:
  const int64_t sequences_max_;
  std::atomic<int64_t> active_{0};
};

}  // namespace minke::gateway
