// The part of a transport that is the same over UCX and in process: peers, handshakes, lanes, credits,
// heartbeats, deadlines, the inbox, and the keepalive thread that makes progress while the engine computes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "libs/base/mutex.h"
#include "libs/transport/credits.h"
#include "libs/transport/driver.h"
#include "libs/transport/handshake.h"
#include "libs/transport/ring.h"
#include "libs/transport/transport.h"

namespace minke::transport::internal {

// Threads: as Transport says. One mutex serialises the driver; the engine thread holds it for a call, the
// keepalive thread takes it only when it is free and the engine has not looked for a quarter of a heartbeat.
class PeerTransport final : public Transport, private DriverSink {
 public:
  // `pool` is the one the driver receives into.
  PeerTransport(std::unique_ptr<FramePool> pool, std::unique_ptr<Driver> driver, Identity identity,
                TransportOptions options);
  // Says goodbye to all peers and waits for them to close, about a heartbeat at most.
  ~PeerTransport() override;

  NodeId self() const override { return identity_.node_id; }
  std::string address() const override { return address_; }
  FramePool& frames() override { return *pool_; }
  RowMemory* row_memory() const override { return options_.rows; }

  absl::Status Connect(NodeId peer, std::string_view address) override;
  void Disconnect(NodeId peer) override;
  absl::Status Send(NodeId peer, FrameRef frame) override;
  bool TakeCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) override;
  void ReturnCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) override;
  int Poll(absl::FunctionRef<void(Event&)> handler) override;
  void Wait(absl::Duration timeout) override;
  void Wake() override;
  std::vector<PeerStatistics> statistics() const override;
  std::vector<PeerStatistics> all_statistics() const override;
  uint64_t bad_frames() const override { return bad_frames_.load(std::memory_order_relaxed); }

 private:
  struct Peer;

  // One lane; the owner of a Link.
  struct Lane {
    Link* link = nullptr;
    Handshake handshake;
    // kLingering: nothing more is sent or listened to, the other side is given time to read what was sent and
    // close.
    enum class Stage { kHandshake, kReady, kLingering } stage = Stage::kHandshake;
    int64_t deadline_ns = 0;    // of the handshake, of lingering
    bool said_goodbye = false;  // the other side
    Peer* peer = nullptr;       // initiator: from the beginning; responder: once the handshake is done
    std::vector<std::pair<FrameRef, uint32_t>>
        early;  // frames and credits that came before the peer was up here

    explicit Lane(Handshake made) : handshake(std::move(made)) {}
    bool initiator() const { return handshake.side() == Handshake::Side::kInitiator; }
    NodeId claimed_id() const { return NodeId{handshake.peer_hello().node_id}; }
  };

  struct Peer {
    NodeId id;
    std::string resolved_address;  // if this node connects
    // kConnecting: the decode lane's handshake is under way, begun here. kAwaiting: the other side's
    // connection is to be used. kHalf: the decode lane is ready, the prefill lane is not. kUp: both are.
    enum class Stage { kConnecting, kAwaiting, kHalf, kUp } stage = Stage::kConnecting;
    bool wanted = false;      // Connect() was called: failing before it was up is an event, too
    bool initiator = false;   // of the connection
    int64_t deadline_ns = 0;  // for being up
    Lane* lanes[wire::kNumTrafficClasses] = {};
    uint8_t version = wire::kVersion;
    uint8_t role = 0;
    bool takes_rows = false;
    std::string transport_name;

    int64_t last_heard_ns = 0;
    int64_t last_sent_ns = 0;
    int64_t silence_max_ns = 0;

    CreditAccount credit[wire::kNumTrafficClasses];
    uint32_t to_return[wire::kNumTrafficClasses] = {};
    int64_t return_by_ns = 0;  // 0: nothing to return

    PeerStatistics statistics;
  };

  struct Received {
    FrameRef frame;
    NodeId peer;
    uint64_t sequence = 0;
  };
  struct Control {
    Event::Kind kind = Event::Kind::kPeerUp;
    NodeId peer;
    absl::Status reason;
    uint64_t sequence = 0;
  };
  // What arrived, in three queues so that decode frames overtake; sequences keep frames and the coming and
  // going of their peers in order.
  struct Inbox {
    Ring<Received> frames[wire::kNumTrafficClasses];
    Ring<Control> control;

    bool empty() const { return frames[0].empty() && frames[1].empty() && control.empty(); }
    void Forget(NodeId peer);
  };

  // DriverSink; called inside ProgressLocked().
  void OnAccept(Link* link) override;
  void OnFrame(Link* link, FrameRef frame, uint32_t credits) override;
  void OnBadFrame(Link* link, const absl::Status& status) override;
  void OnLost(Link* link, const absl::Status& status) override;

  void ProgressLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RunTimers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void KeepaliveLoop();
  int64_t SpinNs() const;

  Peer* Find(NodeId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Peer& AddPeer(NodeId id, Peer::Stage stage) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool HasInboundHandshake(NodeId id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Keeps the statistics of a peer that is about to be forgotten.
  void Remember(const Peer& peer, bool is_error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Lane& AddLane(Link* link, Handshake handshake, Peer* peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status OpenLane(Peer& peer, wire::TrafficClass traffic_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CloseLane(Lane* lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Linger(Lane* lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  void HandleHandshake(Lane* lane, const FrameRef& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void HandshakeFailed(Lane* lane, absl::Status status, bool answered) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status DecideOnHello(Lane* lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LaneReady(Lane* lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PeerUp(Peer& peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LosePeer(Peer* peer, absl::Status reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Goodbye, then all its lanes linger; the peer itself is forgotten.
  void Leave(Peer* peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  void HandleFrame(Lane* lane, FrameRef frame, uint32_t credits) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Deliver(Peer& peer, FrameRef frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the frame's rows have to be in its payload to reach the peer.
  bool NeedsHostRows(const Peer& peer, const FrameRef& frame) const;
  void SendMessage(Lane& lane, const Handshake::Message& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SendControl(Peer& peer, wire::Kind kind, wire::TrafficClass traffic_class)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FlushCredits(Peer& peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Raise(Event::Kind kind, NodeId peer, absl::Status reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AtLatest(int64_t deadline_ns) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (deadline_ns < next_timer_ns_) next_timer_ns_ = deadline_ns;
  }

  // Silence over shared memory is no partition: if nothing is heard after it while connections keep failing,
  // nothing ever will be.
  void CheckHearing() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int64_t deaf_since_ns_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: something was heard since
  int mute_attempts_ ABSL_GUARDED_BY(mutex_) = 0;      // connections since then in which nothing was heard

  const Identity identity_;
  const TransportOptions options_;
  const int64_t heartbeat_ns_;
  const int64_t handshake_timeout_ns_;
  const int64_t send_timeout_ns_;
  const int64_t linger_ns_;
  const std::unique_ptr<FramePool> pool_;
  const std::string address_;
  const uint32_t rows_offset_max_;

  mutable Mutex mutex_;
  const std::unique_ptr<Driver> driver_;  // serialised by mutex_ as driver.h says
  absl::flat_hash_map<NodeId, std::unique_ptr<Peer>> peers_ ABSL_GUARDED_BY(mutex_);
  std::deque<PeerStatistics> gone_ ABSL_GUARDED_BY(mutex_);  // of peers not in peers_; longest gone first
  absl::flat_hash_map<Lane*, std::unique_ptr<Lane>> lanes_ ABSL_GUARDED_BY(mutex_);
  Inbox inbox_ ABSL_GUARDED_BY(mutex_);
  uint64_t sequence_ ABSL_GUARDED_BY(mutex_) = 0;
  bool leaving_ ABSL_GUARDED_BY(mutex_) = false;  // in the destructor
  int64_t now_ns_ ABSL_GUARDED_BY(mutex_);
  int64_t next_timer_ns_ ABSL_GUARDED_BY(mutex_);
  int64_t last_timers_ns_ ABSL_GUARDED_BY(mutex_);

  Inbox delivery_;                // engine thread only: what Poll() is handing over
  bool polling_ = false;          // engine thread only
  uint32_t fruitless_spins_ = 0;  // engine thread only: waits in a row that had to block

  std::atomic<uint64_t> bad_frames_{0};
  std::atomic<bool> wake_{false};
  std::atomic<bool> engine_waits_{false};     // it makes progress itself, in Wait()
  std::atomic<int64_t> engine_looked_ns_{0};  // when it last did

  std::mutex stop_mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;  // guarded by stop_mutex_
  std::thread keepalive_;
};

}  // namespace minke::transport::internal
