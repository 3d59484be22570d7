// The cluster's JSON for whoever asks: made at most a few times a second, however many look. Thread-safe.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "libs/http/exchange.h"

namespace minke::gateway {

class ClusterFeed {
 public:
  static constexpr std::chrono::milliseconds kFresh{200}, kPeriod{1000};
  static constexpr int kListenersMax = 64;

  explicit ClusterFeed(std::function<std::string()> make) : make_(std::move(make)) {}

  // Not older than kFresh.
  std::shared_ptr<const std::string> Latest();
  // One event at once and one every kPeriod, until the client leaves or Stop; nullptr: too many listen.
  static std::unique_ptr<Exchange> Listen(const std::shared_ptr<ClusterFeed>& feed);
  // Ends the streams.
  void Stop() { stopped_ = true; }

 private:
  class Stream;
  const std::function<std::string()> make_;
  std::atomic<int> listeners_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::shared_ptr<const std::string> latest_;        // guarded by mutex_; shared with those who send it
  std::chrono::steady_clock::time_point made_at_{};  // guarded by mutex_
};

}  // namespace minke::gateway
