// Whether the other side of a session is alive: it answers a beat every half heartbeat, from a thread that
// the engine does not keep busy, so one that says nothing for two heartbeats is frozen or cut off; where its
// host has no time for it, twice as much longer as its slowest recent answers took. Of those a bound counts
// at most, so that a node that was frozen for long and froze again is found out too. A pure state machine;
// time comes from outside.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace minke::gateway {

class SessionHealth {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kSlowMaxHeartbeats = 4;

  SessionHealth() = default;
  SessionHealth(std::chrono::milliseconds heartbeat, Clock::time_point opened)
      : heartbeat_(heartbeat), heard_(opened), beat_at_(opened) {}

  // The number of a beat to send now; 0: none is due. At most one is under way, so nothing piles up in front
  // of a node that does not read.
  uint64_t NextBeat(Clock::time_point now) {
    if (sent_ != answered_ || now < beat_at_) return 0;
    sent_at_ = now;
    beat_at_ = now + heartbeat_ / 2;
    return ++sent_;
  }
  // Any message of the node. `beat`: the one it answers, 0: none.
  void Heard(Clock::time_point now, uint64_t beat) {
    heard_ = now;
    if (beat <= answered_ || beat > sent_) return;
    answered_ = beat;
    slow_ = std::min<Clock::duration>(std::max(now - sent_at_, slow_ - slow_ / 16),
                                      kSlowMaxHeartbeats * heartbeat_);
  }
  // This process did not look for a while: what it did not hear meanwhile says nothing.
  void Excuse(Clock::time_point now) { heard_ = now; }

  // It has answered once, so that it is known to read.
  bool open() const { return answered_ > 0; }
  bool silent(Clock::time_point now) const { return now - heard_ > 2 * (heartbeat_ + slow_); }
  Clock::duration silence(Clock::time_point now) const { return now - heard_; }

 private:
  std::chrono::milliseconds heartbeat_{250};
  Clock::time_point heard_{}, beat_at_{}, sent_at_{};
  Clock::duration slow_{};  // largest time of an answer, forgotten slowly
  uint64_t sent_ = 0, answered_ = 0;
};

}  // namespace minke::gateway
