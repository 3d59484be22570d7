// What differs between transports: moving frames over links. Everything else is PeerTransport's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/transport/frame_buffer.h"

namespace minke::transport::internal {

// One lane of a connection, both directions; frames are delivered whole or not at all. Owned by the driver,
// which keeps it until it is closed and nothing of it is under way.
class Link {
 public:
  virtual ~Link() = default;

  // Queues the frame. `version` and `credits` travel in place of what its header says. A failure is reported
  // as a lost link by the next Progress().
  virtual void Send(FrameRef frame, uint8_t version, uint32_t credits, int64_t now_ns) = 0;
  virtual uint32_t sends_pending() const = 0;
  // When the oldest pending send was queued; 0 if there is none.
  virtual int64_t oldest_send_ns() const = 0;
  // As UCX names it: "posix", "tcp", "rc_mlx5" ...; "inproc".
  virtual std::string transport_name() = 0;
  // Drops everything under way; the link is not used, and nothing is reported of it, afterwards.
  virtual void Close() = 0;

  void* owner = nullptr;  // the user's; the driver does not touch it
};

// Receives what a driver's Progress() found. May open, send on and close links.
class DriverSink {
 public:
  virtual void OnAccept(Link* link) = 0;
  // The frame's header is valid.
  virtual void OnFrame(Link* link, FrameRef frame, uint32_t credits) = 0;
  virtual void OnBadFrame(Link* link, const absl::Status& status) = 0;
  virtual void OnLost(Link* link, const absl::Status& status) = 0;

 protected:
  ~DriverSink() = default;
};

// The user serialises all calls, except where noted. The destructor closes all links at once.
class Driver {
 public:
  virtual ~Driver() = default;

  virtual std::string address() const = 0;
  // Whether links carry rows from and to TransportOptions::rows by themselves. Constant.
  virtual bool carries_rows() const = 0;
  // If they do: the largest rows_offset() of a frame whose rows travel so. Constant.
  virtual uint32_t rows_offset_max() const = 0;
  // Any thread; may look up names. The result is what Open() takes.
  virtual absl::StatusOr<std::string> Resolve(std::string_view address) const = 0;
  virtual absl::StatusOr<Link*> Open(const std::string& resolved) = 0;
  virtual void Progress(DriverSink& sink) = 0;

  // Sleeping: PrepareToBlock() arms the wake-up and returns false if there is something to progress already.
  // Then Block() returns at an arrival, at a Signal() since the last Block(), or at the timeout; it is called
  // outside the serialisation, and nothing but Signal() meanwhile.
  virtual bool PrepareToBlock() = 0;
  virtual void Block(int64_t timeout_ns) = 0;
  // Any thread.
  virtual void Signal() = 0;
};

}  // namespace minke::transport::internal
