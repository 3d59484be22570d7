// Moves frames between the processes of a cluster. Two implementations: `ucx` (RDMA, shared memory or TCP,
// chosen by UCX) and `inproc` (roles in one process); `faulty` wraps either and loses, repeats, delays and
// reorders frames by seed.
//
// Messages between two nodes have no order. A frame is delivered whole or not at all; what is not delivered
// is found by its owner's deadline. Heartbeats find frozen peers; a dead one surfaces within 100 ms.
//
// Threads: one thread, the engine, calls everything except Wake() and the const statistics. While the engine
// computes for longer than a heartbeat period, a keepalive thread of the transport makes progress for it:
// received frames wait in the inbox, heartbeats go out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "libs/base/dtype.h"
#include "libs/base/ids.h"
#include "libs/transport/frame_buffer.h"
#include "libs/transport/row_memory.h"
#include "libs/wire/frame.h"

namespace minke::transport {

// What a node says of itself in the handshake. A peer with another fingerprint, precision or secret is
// refused.
struct Identity {
  NodeId node_id;
  uint8_t role = 0;  // cluster.v1 Role number
  Precision precision = Precision::kBF16;
  uint64_t model_fingerprint = 0;
  std::string cluster_secret;  // HMAC-SHA256 key; may be empty
};

enum class PollMode : uint8_t {
  kAdaptive,  // spin (for less while that proves fruitless), then sleep on the event descriptor
  kSpin,
  kBlock,
};

struct TransportOptions {
  PollMode poll = PollMode::kAdaptive;
  absl::Duration spin = absl::Microseconds(50);
  // Sent when nothing else was for half a period; a peer silent for two periods (its own or ours, whichever
  // is longer) is lost.
  absl::Duration heartbeat = absl::Milliseconds(250);
  absl::Duration handshake_timeout = absl::Seconds(5);
  absl::Duration send_timeout = absl::Seconds(5);  // a send not complete by then closes the peer (FORCE)
  // Rows of credit each peer is granted towards this node, per class. A peer may have this many rows here
  // that were not yet returned by ReturnCredit().
  uint32_t credit_rows[wire::kNumTrafficClasses] = {4096, 4096};
  // Credit taken but not returned for this long is presumed lost with its message and forgiven.
  absl::Duration credit_ttl = absl::Seconds(10);
  uint32_t peers_max = 1024;
  uint32_t inbox_frames_max = 65536;   // beyond it the sender's connection is closed
  uint32_t sends_per_peer_max = 4096;  // under way; beyond it Send() is RESOURCE_EXHAUSTED
  // Called once this node hears nobody any more over shared memory, although others live: all of it that ever
  // was said is lost, and will be. A process that is killed between taking a place in another's receive queue
  // and filling it leaves a hole there which UCX's reader never passes. May end the process; null: nothing.
  void (*on_deaf)() = nullptr;
  // Where rows of received frames come to lie, if they can (see row_memory()); null: in host memory. Must
  // outlive the transport and its frames.
  RowMemory* rows = nullptr;
  // The newest wire version this node speaks. Tests are an older peer with it.
  uint8_t wire_version = wire::kVersion;
};

struct Event {
  enum class Kind : uint8_t {
    kFrame,     // frame is set; its header is valid and its kind is not a transport kind
    kPeerUp,    // handshake done in both directions: Send() works
    kPeerLost,  // reason says why; every queued send to it is dropped. Reconnecting is the caller's business.
                //   CANCELLED: it said goodbye. UNAVAILABLE: unreachable, or its connection broke (it died).
                //   DEADLINE_EXCEEDED: silent, or a send or the handshake took too long. FAILED_PRECONDITION:
                //   other model, precision, node or wire version. PERMISSION_DENIED: other secret.
                //   INVALID_ARGUMENT: it sent a malformed frame. RESOURCE_EXHAUSTED: inbox or peer table
                //   full. ABORTED: it connected anew.
  };
  Kind kind;
  NodeId peer;
  FrameRef frame;
  absl::Status reason;
};

// Since this node's start, over all connections with the peer.
struct PeerStatistics {
  NodeId peer;
  std::string transport;  // as UCX names it: "posix", "tcp", "rc_mlx5" ...; "inproc"; empty: was never up
  // Headers included; what the wire below adds is not.
  uint64_t sent_bytes = 0, received_bytes = 0, sent_frames = 0, received_frames = 0;
  // Of the received frames those with row data, by where these came to lie.
  uint64_t frames_in_row_memory = 0, frames_in_host_memory = 0;
  uint64_t errors = 0;  // connections that failed or broke; not those that ended with a goodbye
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual NodeId self() const = 0;
  // Where peers reach this node: "host:port" (ucx), "inproc:ID".
  virtual std::string address() const = 0;
  virtual FramePool& frames() = 0;
  // TransportOptions::rows if this transport carries rows from and to there by itself, else null: then frames
  // have their rows in host memory, and who computes on a GPU stages them.
  virtual RowMemory* row_memory() const = 0;

  // Starts connecting to `peer` at `address`; kPeerUp or kPeerLost follows. Connecting to a peer that is up
  // or on its way (also because it connected to us) does nothing. When both connect at once, one connection
  // wins and each side sees one kPeerUp. No event follows an error returned here (INVALID_ARGUMENT: a
  // malformed address; RESOURCE_EXHAUSTED: peers_max; UNAVAILABLE: the host name does not resolve).
  virtual absl::Status Connect(NodeId peer, std::string_view address) = 0;
  // Says goodbye and closes; no further event of this connection follows here. Unknown peers are ignored.
  virtual void Disconnect(NodeId peer) = 0;

  // Queues `frame` on the lane of its traffic class. The transport supplies magic, version and credits of the
  // header that travels (the frame itself is not written, so it may be sent to several peers); the caller
  // everything else. Does not wait and does not check credit (see TakeCredit). UNAVAILABLE if the peer is not
  // up; RESOURCE_EXHAUSTED if too many sends are under way to it. Rows in row memory must be complete there;
  // to a peer that speaks wire version 1, and where the descriptors are too long for the wire below, they go
  // by way of host memory, which costs a wait for the GPU and may fail with the row memory's error.
  virtual absl::Status Send(NodeId peer, FrameRef frame) = 0;

  // Credit, in rows. TakeCredit is all or nothing. The receiver of rows calls ReturnCredit when it has
  // finished with them; what is returned travels in the next frame to that peer, or in a Credit frame of its
  // own before the peer can run dry.
  virtual bool TakeCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) = 0;
  virtual void ReturnCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) = 0;

  // Makes progress and hands over what arrived since, decode frames first. Returns the number of events.
  // `handler` may call Send, Connect, Disconnect and credit functions.
  virtual int Poll(absl::FunctionRef<void(Event&)> handler) = 0;
  // Returns when Poll() may have something, after Wake(), or at the timeout.
  virtual void Wait(absl::Duration timeout) = 0;
  // Ends the current or next Wait(). Any thread.
  virtual void Wake() = 0;

  // Any thread. Peers that are up.
  virtual std::vector<PeerStatistics> statistics() const = 0;
  // Any thread. Those that are up or on their way, and the 256 that were so last.
  virtual std::vector<PeerStatistics> all_statistics() const = 0;
  // Frames dropped because they were malformed. Any thread.
  virtual uint64_t bad_frames() const = 0;
};

}  // namespace minke::transport
