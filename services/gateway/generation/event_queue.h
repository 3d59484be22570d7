// Events of all the sequences of one request on their way from the pool's threads to the one that answers the
// client. Bounded by the tokens the request may still generate; a client that does not read is dropped by the
// server's write timeout. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "services/gateway/generation/sequence_pool.h"

namespace minke::gateway {

class EventQueue : public std::enable_shared_from_this<EventQueue> {
 public:
  struct Item {
    uint32_t index;  // of the sequence in the request
    SequenceEvent event;
    std::chrono::steady_clock::time_point received;
  };

  // `wake` is called once per batch: when the first event comes after a Take.
  explicit EventQueue(std::function<void()> wake) : wake_(std::move(wake)) {}

  // The sink of one sequence; it keeps the queue alive.
  std::shared_ptr<SequenceSink> SinkFor(uint32_t index) {
    return std::make_shared<Sink>(shared_from_this(), index);
  }

  std::vector<Item> Take() {
    const std::lock_guard lock(mutex_);
    notified_ = false;
    return std::exchange(items_, {});
  }

 private:
  struct Sink : SequenceSink {
    Sink(std::shared_ptr<EventQueue> queue, uint32_t index) : queue_(std::move(queue)), index_(index) {}
    void OnEvent(SequenceEvent event) override {
      queue_->Push({index_, std::move(event), std::chrono::steady_clock::now()});
    }
    const std::shared_ptr<EventQueue> queue_;
    const uint32_t index_;
  };

  void Push(Item item) {
    {
      const std::lock_guard lock(mutex_);
      items_.push_back(std::move(item));
      if (std::exchange(notified_, true)) return;
    }
    wake_();
  }

  const std::function<void()> wake_;
  std::mutex mutex_;
  std::vector<Item> items_;  // guarded by mutex_
  bool notified_ = false;    // guarded by mutex_
};

}  // namespace minke::gateway
