// Times messages between two nodes of a transport: an attention node's Dispatch one way, Partial the other.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/transport/transport.h"

namespace minke::cli::bench {

inline constexpr NodeId kFrameServerId{1}, kFrameClientId{2};

// Answers a FrameClient: returns Dispatch frames as Partial frames, swallows them and gives their credit
// back, or sends as many Partial frames as are asked for. Until the client has left, or `stop`.
void ServeFrames(transport::Transport& transport, const std::atomic<bool>& stop);

// Every wait has a deadline: DEADLINE_EXCEEDED. UNAVAILABLE: the server is gone. Thread-compatible.
class FrameClient {
 public:
  explicit FrameClient(transport::Transport& transport) : transport_(transport) {}

  absl::Status Connect(const std::string& address);

  struct RoundTrips {
    int64_t count = 0;
    double p50_us = 0, p99_us = 0;
  };
  // One Dispatch frame of `payload_bytes` out, one Partial frame as large back, for at least `time`.
  absl::StatusOr<RoundTrips> MeasureRoundTrips(uint32_t payload_bytes, absl::Duration time);
  // Payload bytes a second, one way, as many frames under way as credit allows.
  absl::StatusOr<double> MeasureDispatch(uint32_t payload_bytes, absl::Duration time);
  absl::StatusOr<double> MeasurePartial(uint32_t payload_bytes, absl::Duration time);

 private:
  // Lets the transport work until `done`.
  template <typename Done>
  absl::Status Until(Done done, absl::Time deadline, const char* what);
  absl::StatusOr<absl::Duration> TimePartials(uint32_t payload_bytes, uint32_t count,
                                              absl::Duration expected);
  transport::FrameRef MakeDispatch(uint32_t payload_bytes);
  void Step(absl::Duration timeout);

  transport::Transport& transport_;
  uint64_t run_ = 0;  // of the frames that count now
  bool up_ = false;
  int64_t partials_ = 0;  // of this run
  absl::Status lost_;
};

}  // namespace minke::cli::bench
