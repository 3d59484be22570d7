#include "libs/transport/peer_transport.h"

#include <signal.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/wire/messages.h"

namespace minke::transport::internal {
namespace {

// Returned credit waits this long for a frame to travel with, unless a quarter of the grant has gathered: a
// router refuses work only when all of its grant is out, and an idle process should not be woken per row.
constexpr int64_t kCreditDelayNs = 2'000'000;
constexpr uint32_t kCreditFlushDivisor = 4;
// Frames a lane may get between the other side's Ack and being up here: a few, in the time of a round trip.
constexpr size_t kEarlyFramesMax = 1024;
constexpr size_t kGonePeersMax = 256;  // whose statistics are kept
constexpr uint32_t kFruitlessSpinsMax = 4;
constexpr uint32_t kSpinRetryInterval = 32;
constexpr int64_t kShortSpinDivisor = 16;
// Two peers' attempts of 5 s each are over by then; members that do not live have left the registry's view.
constexpr int64_t kDeafNs = 10'000'000'000;
constexpr int kMuteAttempts = 3;
constexpr std::string_view kSharedMemory = "posix";  // as UCX names it
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

absl::Status SaidGoodbye() { return absl::CancelledError("the other side said goodbye"); }

uint64_t FrameBytes(const FrameRef& frame) {
  return sizeof(wire::FrameHeader) + frame.header().payload_bytes;
}

}  // namespace

PeerTransport::PeerTransport(std::unique_ptr<FramePool> pool, std::unique_ptr<Driver> driver,
                             Identity identity, TransportOptions options)
    : identity_(std::move(identity)),
      options_([&] {
        if (!driver->carries_rows()) options.rows = nullptr;
        return options;
      }()),
      heartbeat_ns_(std::max<int64_t>(absl::ToInt64Nanoseconds(options.heartbeat), 1'000'000)),
      handshake_timeout_ns_(absl::ToInt64Nanoseconds(options.handshake_timeout)),
      send_timeout_ns_(absl::ToInt64Nanoseconds(options.send_timeout)),
      // The other side's keepalive thread looks after 3/8 of a heartbeat at the latest.
      linger_ns_(std::clamp<int64_t>(heartbeat_ns_, 100'000'000, 1'000'000'000)),
      pool_(std::move(pool)),
      address_(driver->address()),
      rows_offset_max_(driver->rows_offset_max()),
      driver_(std::move(driver)),
      now_ns_(NowNs()),
      next_timer_ns_(now_ns_ + heartbeat_ns_ / 2),
      last_timers_ns_(now_ns_) {
  engine_looked_ns_.store(now_ns_, std::memory_order_relaxed);
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  keepalive_ = std::thread([this] {
    SetThreadName("keepalive");
    KeepaliveLoop();
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

PeerTransport::~PeerTransport() {
  {
    const std::lock_guard lock(stop_mutex_);
    stop_ = true;
  }
  stop_changed_.notify_one();
  keepalive_.join();

  const MutexLock lock(mutex_);
  leaving_ = true;
  now_ns_ = NowNs();
  while (!peers_.empty()) Leave(peers_.begin()->second.get());
  std::vector<Lane*> unfinished;
  for (const auto& [lane, owner] : lanes_) {
    if (lane->stage != Lane::Stage::kLingering) unfinished.push_back(lane);
  }
  for (Lane* lane : unfinished) CloseLane(lane);
  const int64_t deadline_ns = NowNs() + linger_ns_;
  while (!lanes_.empty() && NowNs() < deadline_ns) {
    ProgressLocked();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

// ---- Interface
// ----------------------------------------------------------------------------------------------

absl::Status PeerTransport::Connect(NodeId id, std::string_view address) {
  if (id.value == 0 || id == identity_.node_id) {
    return absl::InvalidArgumentError(StrCat("connect: expected another node's id, found ", ToString(id)));
  }
  MK_ASSIGN_OR_RETURN(std::string resolved,
                      driver_->Resolve(address));  // may look up a name: outside the lock

  const MutexLock lock(mutex_);
  now_ns_ = NowNs();
  if (Peer* peer = Find(id); peer != nullptr) {
    peer->wanted = true;
    return absl::OkStatus();
  }
  if (peers_.size() >= options_.peers_max) {
    return absl::ResourceExhaustedError(StrCat("connect: peers_max=", options_.peers_max, " reached"));
  }
  const bool inbound = HasInboundHandshake(id);
  Peer& peer = AddPeer(id, inbound ? Peer::Stage::kAwaiting : Peer::Stage::kConnecting);
  peer.wanted = true;
  peer.resolved_address = std::move(resolved);
  if (!inbound) {
    if (absl::Status status = OpenLane(peer, wire::TrafficClass::kDecode); !status.ok())
      LosePeer(&peer, status);
  }
  return absl::OkStatus();
}

void PeerTransport::Disconnect(NodeId id) {
  {
    const MutexLock lock(mutex_);
    now_ns_ = NowNs();
    inbox_.Forget(id);
    if (Peer* peer = Find(id); peer != nullptr) {
      if (peer->stage == Peer::Stage::kUp) log::Info("transport", StrCat("disconnect node=", ToString(id)));
      Leave(peer);
    }
  }
  delivery_.Forget(id);
}

absl::Status PeerTransport::Send(NodeId id, FrameRef frame) {
  const wire::FrameHeader& header = frame.header();
  MK_CHECK(!wire::IsTransportKind(header.kind) && header.payload_bytes <= frame.capacity());
  const auto traffic_class = static_cast<size_t>(header.traffic_class);
  MK_CHECK(traffic_class < wire::kNumTrafficClasses);
  if (frame.device_rows() != nullptr) {
    bool needs_host_rows = false;
    {
      const MutexLock lock(mutex_);
      const Peer* const peer = Find(id);
      needs_host_rows = peer != nullptr && NeedsHostRows(*peer, frame);
    }
    if (needs_host_rows) {
      // A frame of its own: this one may be on its way to others. Outside the lock: it waits for the GPU.
      MK_ASSIGN_OR_RETURN(FrameRef copy, pool_->CopyToHost(frame));
      return Send(id, std::move(copy));
    }
  }

  const MutexLock lock(mutex_);
  Peer* const peer = Find(id);
  // (It may have come up between the two locks.)
  if (peer == nullptr || peer->stage != Peer::Stage::kUp ||
      (frame.device_rows() != nullptr && NeedsHostRows(*peer, frame))) {
    return absl::UnavailableError(StrCat("send: node ", ToString(id), " is not connected"));
  }
  const uint32_t pending = peer->lanes[0]->link->sends_pending() + peer->lanes[1]->link->sends_pending();
  if (pending >= options_.sends_per_peer_max) {
    return absl::ResourceExhaustedError(StrCat("send: ", pending, " sends under way to node ", ToString(id)));
  }
  const uint32_t credits = std::exchange(peer->to_return[traffic_class], 0);
  if (peer->to_return[0] == 0 && peer->to_return[1] == 0) peer->return_by_ns = 0;
  peer->last_sent_ns = NowNs();
  AtLatest(peer->last_sent_ns + send_timeout_ns_);
  ++peer->statistics.sent_frames;
  peer->statistics.sent_bytes += FrameBytes(frame);
  peer->lanes[traffic_class]->link->Send(std::move(frame), peer->version, credits, peer->last_sent_ns);
  return absl::OkStatus();
}

bool PeerTransport::NeedsHostRows(const Peer& peer, const FrameRef& frame) const {
  // Without row memory of its own, or of an older version, a peer would have UCX bring rows of a GPU to its
  // host bit by bit, under this transport's lock.
  return options_.rows == nullptr || frame.rows_offset() > rows_offset_max_ || !peer.takes_rows ||
         peer.version < wire::kVersionRowsApart;
}

bool PeerTransport::TakeCredit(NodeId id, wire::TrafficClass traffic_class, uint32_t rows) {
  const MutexLock lock(mutex_);
  Peer* const peer = Find(id);
  if (peer == nullptr || peer->stage != Peer::Stage::kUp) return false;
  return peer->credit[static_cast<size_t>(traffic_class)].Take(rows, NowNs());
}

void PeerTransport::ReturnCredit(NodeId id, wire::TrafficClass traffic_class, uint32_t rows) {
  const MutexLock lock(mutex_);
  Peer* const peer = Find(id);
  if (peer == nullptr || peer->stage != Peer::Stage::kUp || rows == 0) return;
  const auto index = static_cast<size_t>(traffic_class);
  const uint32_t granted = options_.credit_rows[index];
  uint32_t& to_return = peer->to_return[index];
  // Duplicated messages return more than was taken; the sender ignores what exceeds it.
  to_return = static_cast<uint32_t>(std::min<uint64_t>(uint64_t{to_return} + rows, granted));
  if (to_return >= std::max<uint32_t>(granted / kCreditFlushDivisor, 1)) {
    SendControl(*peer, wire::Kind::kCredit, traffic_class);
  } else if (peer->return_by_ns == 0) {
    peer->return_by_ns = NowNs() + kCreditDelayNs;
    AtLatest(peer->return_by_ns);
  }
}

int PeerTransport::Poll(absl::FunctionRef<void(Event&)> handler) {
  MK_CHECK(!polling_);
  {
    const MutexLock lock(mutex_);
    ProgressLocked();
    engine_looked_ns_.store(now_ns_, std::memory_order_relaxed);
    if (inbox_.empty()) return 0;
    std::swap(inbox_, delivery_);
  }
  polling_ = true;
  int events = 0;
  Event event{};
  for (bool more = true; more;) {
    const uint64_t limit =
        delivery_.control.empty() ? std::numeric_limits<uint64_t>::max() : delivery_.control.front().sequence;
    for (Ring<Received>& frames : delivery_.frames) {
      while (!frames.empty() && frames.front().sequence < limit) {
        Received received = frames.pop_front();
        if (!received.frame) continue;  // Disconnect() by the handler
        event.kind = Event::Kind::kFrame;
        event.peer = received.peer;
        event.frame = std::move(received.frame);
        handler(event);
        event.frame = FrameRef();
        ++events;
      }
    }
    more = !delivery_.control.empty();
    if (more) {
      Control control = delivery_.control.pop_front();
      if (control.peer.value == 0) continue;
      event.kind = control.kind;
      event.peer = control.peer;
      event.reason = std::move(control.reason);
      handler(event);
      event.reason = absl::OkStatus();
      ++events;
    }
  }
  polling_ = false;
  return events;
}

void PeerTransport::Wait(absl::Duration timeout) {
  const int64_t begin_ns = NowNs();
  const int64_t timeout_ns = std::max<int64_t>(absl::ToInt64Nanoseconds(timeout), 0);
  const int64_t deadline_ns = timeout_ns > kNever - begin_ns ? kNever : begin_ns + timeout_ns;
  int64_t spin_until_ns = deadline_ns;
  switch (options_.poll) {
    case PollMode::kAdaptive:
      spin_until_ns = begin_ns + SpinNs();
      break;
    case PollMode::kSpin:
      break;
    case PollMode::kBlock:
      spin_until_ns = begin_ns;
      break;
  }

  bool blocked = false;
  engine_waits_.store(true, std::memory_order_relaxed);
  for (;;) {
    int64_t now_ns, block_until_ns;
    {
      const MutexLock lock(mutex_);
      ProgressLocked();
      now_ns = now_ns_;
      engine_looked_ns_.store(now_ns, std::memory_order_relaxed);
      if (!inbox_.empty() || now_ns >= deadline_ns) break;
      if (wake_.load(std::memory_order_acquire)) break;
      if (now_ns < spin_until_ns || !driver_->PrepareToBlock()) continue;
      block_until_ns = std::min(deadline_ns, next_timer_ns_);
    }
    blocked = true;
    if (block_until_ns > now_ns) driver_->Block(block_until_ns - now_ns);
  }
  fruitless_spins_ = blocked ? fruitless_spins_ + 1 : 0;
  wake_.store(false, std::memory_order_release);
  engine_waits_.store(false, std::memory_order_relaxed);
}

// Spinning is for peers that answer from another core. Where they do not (they compute for long, or wait for
// the very core this thread spins on) it only keeps the core from them: then most waits spin for a fraction,
// and every 32nd tries the full time again.
int64_t PeerTransport::SpinNs() const {
  const int64_t full_ns = absl::ToInt64Nanoseconds(options_.spin);
  return fruitless_spins_ < kFruitlessSpinsMax || fruitless_spins_ % kSpinRetryInterval == 0
             ? full_ns
             : full_ns / kShortSpinDivisor;
}

void PeerTransport::Wake() {
  if (!wake_.exchange(true, std::memory_order_acq_rel)) driver_->Signal();
}

std::vector<PeerStatistics> PeerTransport::statistics() const {
  const MutexLock lock(mutex_);
  std::vector<PeerStatistics> all;
  for (const auto& [id, peer] : peers_) {
    if (peer->stage == Peer::Stage::kUp) all.push_back(peer->statistics);
  }
  return all;
}

std::vector<PeerStatistics> PeerTransport::all_statistics() const {
  const MutexLock lock(mutex_);
  std::vector<PeerStatistics> all(gone_.begin(), gone_.end());
  for (const auto& [id, peer] : peers_) all.push_back(peer->statistics);
  return all;
}

// ---- Progress and time
// --------------------------------------------------------------------------------------

void PeerTransport::ProgressLocked() {
  now_ns_ = NowNs();
  driver_->Progress(*this);
  if (now_ns_ >= next_timer_ns_) RunTimers();
}

void PeerTransport::KeepaliveLoop() {
  const std::chrono::nanoseconds period(heartbeat_ns_ / 8);
  std::unique_lock stop_lock(stop_mutex_);
  while (!stop_changed_.wait_for(stop_lock, period, [&] { return stop_; })) {
    if (engine_waits_.load(std::memory_order_relaxed)) continue;
    if (NowNs() - engine_looked_ns_.load(std::memory_order_relaxed) < heartbeat_ns_ / 4) continue;
    if (!mutex_.try_lock()) continue;  // the engine is back
    ProgressLocked();
    mutex_.unlock();
  }
}

void PeerTransport::CheckHearing() {
  const bool deaf =
      deaf_since_ns_ != 0 && mute_attempts_ >= kMuteAttempts && now_ns_ - deaf_since_ns_ > kDeafNs;
  if (!deaf || !options_.on_deaf) return;
  log::Error("transport", StrCat("nothing was heard for ", (now_ns_ - deaf_since_ns_) / 1'000'000'000,
                                 " s, through ", mute_attempts_, " connections: shared memory is stuck"));
  deaf_since_ns_ = 0;
  options_.on_deaf();
}

void PeerTransport::RunTimers() {
  // Whoever looks (engine or keepalive) does so twice per heartbeat. If nobody did for longer than one, this
  // process was stopped or starved, and its peers' silence proves nothing: they get a full measure of time
  // again.
  const bool was_frozen = now_ns_ - last_timers_ns_ > heartbeat_ns_;
  last_timers_ns_ = now_ns_;
  next_timer_ns_ = now_ns_ + heartbeat_ns_ / 2;

  std::vector<Lane*> late_lanes;
  for (const auto& [lane, owner] : lanes_) {
    if (lane->stage == Lane::Stage::kReady) continue;
    if (now_ns_ >= lane->deadline_ns) {
      late_lanes.push_back(lane);
    } else {
      AtLatest(lane->deadline_ns);
    }
  }
  for (Lane* lane : late_lanes) {
    if (lane->stage == Lane::Stage::kHandshake && lane->peer != nullptr)
      continue;  // the peer's deadline is the same
    if (lane->stage == Lane::Stage::kHandshake) {
      ++mute_attempts_;
      log::Warning("transport", StrCat("a connecting node did not finish its handshake in ",
                                       absl::FormatDuration(options_.handshake_timeout)));
    }
    CloseLane(lane);
  }

  std::vector<std::pair<Peer*, absl::Status>> lost;
  for (const auto& [id, owner] : peers_) {
    Peer& peer = *owner;
    if (peer.stage != Peer::Stage::kUp) {
      if (now_ns_ >= peer.deadline_ns) {
        ++mute_attempts_;
        lost.emplace_back(
            &peer, absl::DeadlineExceededError(
                       StrCat("not connected within ", absl::FormatDuration(options_.handshake_timeout))));
      } else {
        AtLatest(peer.deadline_ns);
      }
      continue;
    }
    if (was_frozen) peer.last_heard_ns = now_ns_;
    const int64_t silence_ns = now_ns_ - peer.last_heard_ns;
    if (silence_ns >= peer.silence_max_ns) {
      if (deaf_since_ns_ == 0 && peer.statistics.transport == kSharedMemory) deaf_since_ns_ = now_ns_;
      lost.emplace_back(&peer,
                        absl::DeadlineExceededError(StrCat("silent for ", silence_ns / 1'000'000, " ms")));
      continue;
    }
    AtLatest(peer.last_heard_ns + peer.silence_max_ns);
    bool send_late = false;
    for (const Lane* lane : peer.lanes) {
      const int64_t oldest_ns = lane->link->oldest_send_ns();
      if (oldest_ns == 0) continue;
      send_late |= now_ns_ - oldest_ns >= send_timeout_ns_;
      AtLatest(oldest_ns + send_timeout_ns_);
    }
    if (send_late) {
      lost.emplace_back(
          &peer, absl::DeadlineExceededError(
                     StrCat("a send did not complete within ", absl::FormatDuration(options_.send_timeout))));
      continue;
    }
    if (peer.return_by_ns != 0) {
      if (now_ns_ >= peer.return_by_ns) {
        FlushCredits(peer);
      } else {
        AtLatest(peer.return_by_ns);
      }
    }
    if (now_ns_ - peer.last_sent_ns >= heartbeat_ns_ / 2) {
      SendControl(peer, wire::Kind::kHeartbeat, wire::TrafficClass::kDecode);
    }
    AtLatest(peer.last_sent_ns + heartbeat_ns_ / 2);
  }
  for (auto& [peer, status] : lost) LosePeer(peer, std::move(status));
  CheckHearing();
}

// ---- Lanes and peers
// ----------------------------------------------------------------------------------------

PeerTransport::Peer* PeerTransport::Find(NodeId id) {
  const auto found = peers_.find(id);
  return found == peers_.end() ? nullptr : found->second.get();
}

PeerTransport::Peer& PeerTransport::AddPeer(NodeId id, Peer::Stage stage) {
  auto peer = std::make_unique<Peer>();
  peer->id = id;
  peer->stage = stage;
  peer->deadline_ns = now_ns_ + handshake_timeout_ns_;
  AtLatest(peer->deadline_ns);
  peer->statistics.peer = id;
  const auto before =
      std::find_if(gone_.begin(), gone_.end(), [id](const PeerStatistics& gone) { return gone.peer == id; });
  if (before != gone_.end()) {
    peer->statistics = std::move(*before);
    gone_.erase(before);
  }
  return *(peers_[id] = std::move(peer));
}

void PeerTransport::Remember(const Peer& peer, bool is_error) {
  gone_.push_back(peer.statistics);
  gone_.back().errors += is_error ? 1 : 0;
  if (gone_.size() > kGonePeersMax) gone_.pop_front();
}

bool PeerTransport::HasInboundHandshake(NodeId id) const {
  return std::any_of(lanes_.begin(), lanes_.end(), [&](const auto& entry) {
    const Lane& lane = *entry.second;
    return !lane.initiator() && lane.stage == Lane::Stage::kHandshake && lane.claimed_id() == id;
  });
}

PeerTransport::Lane& PeerTransport::AddLane(Link* link, Handshake handshake, Peer* peer) {
  auto lane = std::make_unique<Lane>(std::move(handshake));
  lane->link = link;
  lane->peer = peer;
  lane->deadline_ns = now_ns_ + handshake_timeout_ns_;
  AtLatest(lane->deadline_ns);
  link->owner = lane.get();
  Lane* const raw = lane.get();
  lanes_[raw] = std::move(lane);
  return *raw;
}

absl::Status PeerTransport::OpenLane(Peer& peer, wire::TrafficClass traffic_class) {
  MK_ASSIGN_OR_RETURN(Link * link, driver_->Open(peer.resolved_address));
  Lane& lane = AddLane(link,
                       Handshake(Handshake::Side::kInitiator, identity_, options_, traffic_class, peer.id,
                                 {.newest = options_.wire_version}),
                       &peer);
  peer.lanes[static_cast<size_t>(traffic_class)] = &lane;
  SendMessage(lane, lane.handshake.Start());
  return absl::OkStatus();
}

void PeerTransport::CloseLane(Lane* lane) {
  lane->link->owner = nullptr;
  lane->link->Close();
  lanes_.erase(lane);
}

void PeerTransport::Linger(Lane* lane) {
  lane->stage = Lane::Stage::kLingering;
  lane->peer = nullptr;
  lane->early.clear();
  lane->deadline_ns = now_ns_ + linger_ns_;
  AtLatest(lane->deadline_ns);
}

void PeerTransport::Leave(Peer* peer) {
  for (Lane* lane : peer->lanes) {
    if (lane == nullptr) continue;
    // On every lane, because they have no order between them.
    if (lane->stage == Lane::Stage::kReady) {
      SendControl(*peer, wire::Kind::kGoodbye, lane->handshake.traffic_class());
      Linger(lane);
    } else {
      CloseLane(lane);
    }
  }
  Remember(*peer, /*is_error=*/false);
  peers_.erase(peer->id);
}

void PeerTransport::LosePeer(Peer* peer, absl::Status reason) {
  const bool was_up = peer->stage == Peer::Stage::kUp;
  const std::string line =
      StrCat(was_up ? "peer lost" : "not connected", " node=", ToString(peer->id), ": ", reason.ToString());
  if (absl::IsCancelled(reason)) {
    log::Info("transport", line);
  } else {
    log::Warning("transport", line);
  }
  Remember(*peer, /*is_error=*/!absl::IsCancelled(reason));
  if (was_up || peer->wanted) Raise(Event::Kind::kPeerLost, peer->id, std::move(reason));
  for (Lane* lane : peer->lanes) {
    if (lane != nullptr) CloseLane(lane);
  }
  peers_.erase(peer->id);
}

void PeerTransport::PeerUp(Peer& peer) {
  peer.stage = Peer::Stage::kUp;
  peer.last_heard_ns = now_ns_;
  peer.last_sent_ns = now_ns_;
  peer.statistics.transport = peer.lanes[0]->link->transport_name();
  AtLatest(now_ns_ + heartbeat_ns_ / 2);
  log::Info("transport", StrCat("peer up node=", ToString(peer.id), " role=", int{peer.role}, " transport=",
                                peer.statistics.transport, " wire_version=", int{peer.version}));
  Raise(Event::Kind::kPeerUp, peer.id, absl::OkStatus());

  std::vector<std::pair<FrameRef, uint32_t>> early[wire::kNumTrafficClasses];
  for (size_t i = 0; i < wire::kNumTrafficClasses; ++i) early[i] = std::exchange(peer.lanes[i]->early, {});
  const NodeId id = peer.id;
  for (size_t i = 0; i < wire::kNumTrafficClasses; ++i) {
    for (auto& [frame, credits] : early[i]) {
      if (Find(id) != &peer) return;  // the frame before was a goodbye, or bad
      HandleFrame(peer.lanes[i], std::move(frame), credits);
    }
  }
}

void PeerTransport::Raise(Event::Kind kind, NodeId peer, absl::Status reason) {
  inbox_.control.push_back({kind, peer, std::move(reason), ++sequence_});
}

void PeerTransport::Inbox::Forget(NodeId peer) {
  for (Ring<Received>& ring : frames) {
    for (size_t i = 0; i < ring.size(); ++i) {
      if (ring[i].peer == peer) ring[i].frame = FrameRef();
    }
  }
  for (size_t i = 0; i < control.size(); ++i) {
    if (control[i].peer == peer) control[i].peer = NodeId{};
  }
}

// ---- Handshake
// ----------------------------------------------------------------------------------------------

void PeerTransport::OnAccept(Link* link) {
  mutex_.AssertHeld();
  if (leaving_) return link->Close();
  if (lanes_.size() >= size_t{options_.peers_max} * 2 * wire::kNumTrafficClasses) {
    log::Warning("transport", StrCat("connection refused: peers_max=", options_.peers_max, " reached"));
    link->Close();
    return;
  }
  AddLane(link,
          Handshake(Handshake::Side::kResponder, identity_, options_, wire::TrafficClass::kDecode, {},
                    {.newest = options_.wire_version}),
          nullptr);
}

void PeerTransport::HandleHandshake(Lane* lane, const FrameRef& frame) {
  Handshake& handshake = lane->handshake;
  const wire::FrameHeader& header = frame.header();
  if (header.kind == wire::Kind::kHello && !lane->initiator())
    handshake.set_traffic_class(header.traffic_class);
  Handshake::Step step = handshake.Receive(header.kind, frame.payload_span());
  if (step.answer.has_value()) SendMessage(*lane, *step.answer);
  if (!step.status.ok()) return HandshakeFailed(lane, std::move(step.status), step.answer.has_value());
  if (handshake.must_decide()) {
    const absl::Status decision = DecideOnHello(lane);
    if (!decision.ok()) {
      SendMessage(*lane, handshake.Refuse(decision));
      return HandshakeFailed(lane, decision, /*answered=*/true);
    }
    SendMessage(*lane, handshake.Accept());
  }
  if (handshake.done()) LaneReady(lane);
}

void PeerTransport::HandshakeFailed(Lane* lane, absl::Status status, bool answered) {
  Peer* const peer = lane->peer;
  if (peer != nullptr) peer->lanes[static_cast<size_t>(lane->handshake.traffic_class())] = nullptr;
  const bool duplicate = absl::IsAlreadyExists(status);
  if (peer == nullptr && !duplicate) {
    log::Warning("transport",
                 StrCat("connection refused node=", ToString(lane->claimed_id()), ": ", status.ToString()));
  }
  const bool use_theirs = peer != nullptr && duplicate && lane->handshake.refused_by_peer() &&
                          peer->stage == Peer::Stage::kConnecting;
  // A refusal must be read before the connection breaks.
  if (answered) {
    Linger(lane);
  } else {
    CloseLane(lane);
  }
  if (use_theirs) {
    peer->stage = Peer::Stage::kAwaiting;
    peer->deadline_ns = now_ns_ + handshake_timeout_ns_;
    AtLatest(peer->deadline_ns);
  } else if (peer != nullptr) {
    LosePeer(peer, std::move(status));
  }
}

// When both nodes connect at once, the connection of the smaller id wins. The node with the smaller id never
// has two: it refuses the other's while its own is under way, and does not begin its own while the other's is
// (Connect).
absl::Status PeerTransport::DecideOnHello(Lane* lane) {
  const NodeId id = lane->claimed_id();
  if (id == identity_.node_id) return absl::InvalidArgumentError("a node cannot connect to itself");
  Peer* const peer = Find(id);
  if (lane->handshake.traffic_class() == wire::TrafficClass::kPrefill) {
    if (peer == nullptr || peer->stage != Peer::Stage::kHalf || peer->initiator) {
      return absl::FailedPreconditionError("a prefill lane needs its decode lane first");
    }
    return absl::OkStatus();
  }
  if (peer == nullptr) {
    if (peers_.size() >= options_.peers_max) {
      return absl::ResourceExhaustedError(StrCat("peers_max=", options_.peers_max, " reached"));
    }
  } else if (peer->stage == Peer::Stage::kConnecting && identity_.node_id < id) {
    return absl::AlreadyExistsError("both connect at once; the connection of the smaller id is used");
  }
  return absl::OkStatus();
}

void PeerTransport::LaneReady(Lane* lane) {
  const HelloPayload& hello = lane->handshake.peer_hello();
  const NodeId id = lane->claimed_id();
  lane->stage = Lane::Stage::kReady;

  if (lane->handshake.traffic_class() == wire::TrafficClass::kPrefill) {
    if (!lane->initiator()) {
      Peer* const peer = Find(id);
      if (peer == nullptr || peer->stage != Peer::Stage::kHalf || peer->initiator) return CloseLane(lane);
      lane->peer = peer;
      peer->lanes[static_cast<size_t>(wire::TrafficClass::kPrefill)] = lane;
    }
    return PeerUp(*lane->peer);
  }

  if (!lane->initiator()) {
    Peer* peer = Find(id);
    if (peer != nullptr && (peer->stage == Peer::Stage::kHalf || peer->stage == Peer::Stage::kUp)) {
      // It has lost the old connection before this node noticed.
      LosePeer(peer, absl::AbortedError("replaced by a new connection of the same node"));
      peer = nullptr;
    }
    if (peer == nullptr) peer = &AddPeer(id, Peer::Stage::kHalf);
    Lane*& decode = peer->lanes[static_cast<size_t>(wire::TrafficClass::kDecode)];
    if (decode != nullptr) CloseLane(decode);  // our own attempt; theirs won
    decode = lane;
    lane->peer = peer;
  }
  Peer& peer = *lane->peer;
  peer.stage = Peer::Stage::kHalf;
  peer.initiator = lane->initiator();
  peer.deadline_ns = now_ns_ + handshake_timeout_ns_;
  AtLatest(peer.deadline_ns);
  peer.version = lane->handshake.version();
  peer.role = hello.role;
  peer.takes_rows = hello.takes_rows != 0;
  peer.silence_max_ns = 2 * std::max(heartbeat_ns_, int64_t{hello.heartbeat_ms} * 1'000'000);
  for (size_t i = 0; i < wire::kNumTrafficClasses; ++i) {
    peer.credit[i] = CreditAccount(hello.credit_rows[i], absl::ToInt64Nanoseconds(options_.credit_ttl));
  }
  if (peer.initiator) {
    if (absl::Status status = OpenLane(peer, wire::TrafficClass::kPrefill); !status.ok())
      LosePeer(&peer, status);
  }
}

// ---- Frames
// -------------------------------------------------------------------------------------------------

void PeerTransport::OnFrame(Link* link, FrameRef frame, uint32_t credits) {
  mutex_.AssertHeld();
  deaf_since_ns_ = 0;
  mute_attempts_ = 0;
  auto* const lane = static_cast<Lane*>(link->owner);
  if (lane == nullptr) return;
  switch (lane->stage) {
    case Lane::Stage::kHandshake:
      if (wire::IsHandshakeKind(frame.header().kind)) return HandleHandshake(lane, frame);
      if (lane->handshake.awaits_ack() && lane->early.size() < kEarlyFramesMax) {
        lane->early.emplace_back(std::move(frame), credits);
        return;
      }
      return OnBadFrame(link, absl::InvalidArgumentError(
                                  StrCat(ToString(frame.header().kind), " before the handshake was done")));
    case Lane::Stage::kReady:
      if (lane->peer->stage == Peer::Stage::kUp) return HandleFrame(lane, std::move(frame), credits);
      if (lane->early.size() < kEarlyFramesMax) {
        lane->early.emplace_back(std::move(frame), credits);
        return;
      }
      return OnBadFrame(link, absl::InvalidArgumentError("frames before both lanes were ready"));
    case Lane::Stage::kLingering:
      return;
  }
}

void PeerTransport::HandleFrame(Lane* lane, FrameRef frame, uint32_t credits) {
  Peer& peer = *lane->peer;
  const wire::FrameHeader& header = frame.header();
  if (header.traffic_class != lane->handshake.traffic_class() || wire::IsHandshakeKind(header.kind)) {
    return OnBadFrame(lane->link,
                      absl::InvalidArgumentError(StrCat(
                          ToString(header.kind), " class ", static_cast<int>(header.traffic_class),
                          " on a ready lane of class ", static_cast<int>(lane->handshake.traffic_class()))));
  }
  peer.last_heard_ns = now_ns_;
  ++peer.statistics.received_frames;
  peer.statistics.received_bytes += FrameBytes(frame);
  if (wire::RowDataOffsetOf(header).has_value()) {
    ++(frame.device_rows() != nullptr ? peer.statistics.frames_in_row_memory
                                      : peer.statistics.frames_in_host_memory);
  }
  if (credits != 0) peer.credit[static_cast<size_t>(header.traffic_class)].Return(credits);
  if (!wire::IsTransportKind(header.kind)) return Deliver(peer, std::move(frame));
  if (header.kind == wire::Kind::kGoodbye) {
    // Lanes have no order between them: frames may still come over the other one.
    lane->said_goodbye = true;
    if (peer.lanes[0]->said_goodbye && peer.lanes[1]->said_goodbye) LosePeer(&peer, SaidGoodbye());
  }
}

void PeerTransport::Deliver(Peer& peer, FrameRef frame) {
  if (inbox_.frames[0].size() + inbox_.frames[1].size() >= options_.inbox_frames_max) {
    return LosePeer(&peer, absl::ResourceExhaustedError(
                               StrCat("inbox_frames_max=", options_.inbox_frames_max, " reached")));
  }
  const auto traffic_class = static_cast<size_t>(frame.header().traffic_class);
  inbox_.frames[traffic_class].push_back({std::move(frame), peer.id, ++sequence_});
}

void PeerTransport::OnBadFrame(Link* link, const absl::Status& status) {
  mutex_.AssertHeld();
  bad_frames_.fetch_add(1, std::memory_order_relaxed);
  auto* const lane = static_cast<Lane*>(link->owner);
  if (lane == nullptr || lane->stage == Lane::Stage::kLingering) return;
  if (lane->peer != nullptr) return LosePeer(lane->peer, status);
  log::Warning("transport", StrCat("connection closed: ", status.ToString()));
  CloseLane(lane);
}

void PeerTransport::OnLost(Link* link, const absl::Status& status) {
  mutex_.AssertHeld();
  auto* const lane = static_cast<Lane*>(link->owner);
  if (lane == nullptr) return;
  if (Peer* const peer = lane->peer; peer != nullptr) {
    const bool said_goodbye = std::any_of(std::begin(peer->lanes), std::end(peer->lanes),
                                          [](const Lane* l) { return l != nullptr && l->said_goodbye; });
    return LosePeer(peer, said_goodbye ? SaidGoodbye() : status);
  }
  if (lane->stage == Lane::Stage::kHandshake) ++mute_attempts_;
  CloseLane(lane);
}

void PeerTransport::SendMessage(Lane& lane, const Handshake::Message& message) {
  FrameRef frame = pool_->Allocate(static_cast<uint32_t>(message.payload.size()));
  frame.header().kind = message.kind;
  frame.header().version = wire::kHandshakeVersion;
  frame.header().traffic_class = lane.handshake.traffic_class();
  std::copy(message.payload.begin(), message.payload.end(), frame.payload());
  lane.link->Send(std::move(frame), wire::kHandshakeVersion, 0, now_ns_);
}

void PeerTransport::SendControl(Peer& peer, wire::Kind kind, wire::TrafficClass traffic_class) {
  const auto index = static_cast<size_t>(traffic_class);
  FrameRef frame = pool_->Allocate(0);
  frame.header().kind = kind;
  frame.header().traffic_class = traffic_class;
  const uint32_t credits = std::exchange(peer.to_return[index], 0);
  if (peer.to_return[0] == 0 && peer.to_return[1] == 0) peer.return_by_ns = 0;
  peer.last_sent_ns = NowNs();
  ++peer.statistics.sent_frames;
  peer.statistics.sent_bytes += FrameBytes(frame);
  peer.lanes[index]->link->Send(std::move(frame), peer.version, credits, peer.last_sent_ns);
}

void PeerTransport::FlushCredits(Peer& peer) {
  for (int i = 0; i < wire::kNumTrafficClasses; ++i) {
    if (peer.to_return[i] != 0) SendControl(peer, wire::Kind::kCredit, static_cast<wire::TrafficClass>(i));
  }
}

}  // namespace minke::transport::internal
