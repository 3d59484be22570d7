#include "libs/transport/faulty/faulty.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/time/clock.h"

namespace minke::transport {
namespace {

constexpr uint64_t kNotByFrames = std::numeric_limits<uint64_t>::max();

void Count(std::atomic<uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

FaultyTransport::FaultyTransport(std::unique_ptr<Transport> inner, FaultOptions options)
    : options_(options), inner_(std::move(inner)), random_state_(options.seed) {}

// splitmix64: the same numbers everywhere, which the standard's distributions do not promise.
double FaultyTransport::Draw() {
  uint64_t z = (random_state_ += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

absl::Status FaultyTransport::Send(NodeId peer, FrameRef frame) {
  if (!up_.contains(peer)) return inner_->Send(peer, std::move(frame));
  // Always six draws, so that a frame's fate depends on its number only.
  const bool drop = Draw() < options_.drop_probability;
  const bool duplicate = Draw() < options_.duplicate_probability;
  const bool delay = Draw() < options_.delay_probability;
  const absl::Duration delay_time = options_.delay_max * Draw();
  const bool reorder = Draw() < options_.reorder_probability;
  const auto span = 1 + static_cast<uint64_t>(Draw() * options_.reorder_span_max);
  ++frames_sent_;

  absl::Status status;
  if (((options_.kinds >> (static_cast<unsigned>(frame.header().kind) & 63)) & 1) == 0) {
    status = inner_->Send(peer, std::move(frame));
  } else {
    Count(frames_);
    if (drop) {
      Count(dropped_);
    } else {
      if (duplicate) {
        Count(duplicated_);
        status = inner_->Send(peer, frame);
      }
      if (!status.ok()) {
        // The first of two failed: so would the second.
      } else if ((delay || reorder) && held_.size() < options_.held_frames_max) {
        Count(delay ? delayed_ : reordered_);
        const absl::Time now = absl::Now();
        held_.push_back({peer, std::move(frame), now + (delay ? delay_time : options_.delay_max),
                         delay ? kNotByFrames : frames_sent_ + span});
      } else {
        status = inner_->Send(peer, std::move(frame));
      }
    }
  }
  if (!held_.empty()) ReleaseDue(/*look_at_clock=*/false);
  return status;
}

void FaultyTransport::ReleaseDue(bool look_at_clock) {
  const absl::Time now = look_at_clock ? absl::Now() : absl::InfinitePast();
  for (size_t i = 0; i < held_.size();) {
    if (held_[i].due_at_frame > frames_sent_ && held_[i].due > now) {
      ++i;
      continue;
    }
    Held due = std::move(held_[i]);
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(i));
    // Its caller was told OK already; a frame that cannot go now is a lost one.
    if (!inner_->Send(due.peer, std::move(due.frame)).ok()) Count(dropped_);
  }
}

void FaultyTransport::ForgetPeer(NodeId peer) {
  up_.erase(peer);
  held_.erase(std::remove_if(held_.begin(), held_.end(), [&](const Held& held) { return held.peer == peer; }),
              held_.end());
}

void FaultyTransport::Disconnect(NodeId peer) {
  ForgetPeer(peer);
  inner_->Disconnect(peer);
}

int FaultyTransport::Poll(absl::FunctionRef<void(Event&)> handler) {
  if (!held_.empty()) ReleaseDue(/*look_at_clock=*/true);
  return inner_->Poll([&](Event& event) {
    switch (event.kind) {
      case Event::Kind::kFrame:
        break;
      case Event::Kind::kPeerUp:
        up_.insert(event.peer);
        break;
      case Event::Kind::kPeerLost:
        ForgetPeer(event.peer);
        break;
    }
    handler(event);
  });
}

void FaultyTransport::Wait(absl::Duration timeout) {
  if (!held_.empty()) {
    const auto first = std::min_element(held_.begin(), held_.end(),
                                        [](const Held& a, const Held& b) { return a.due < b.due; });
    timeout = std::min(timeout, std::max(first->due - absl::Now(), absl::ZeroDuration()));
  }
  inner_->Wait(timeout);
}

FaultCounts FaultyTransport::counts() const {
  FaultCounts counts;
  counts.frames = frames_.load(std::memory_order_relaxed);
  counts.dropped = dropped_.load(std::memory_order_relaxed);
  counts.duplicated = duplicated_.load(std::memory_order_relaxed);
  counts.delayed = delayed_.load(std::memory_order_relaxed);
  counts.reordered = reordered_.load(std::memory_order_relaxed);
  return counts;
}

std::unique_ptr<FaultyTransport> CreateFaulty(std::unique_ptr<Transport> inner, FaultOptions options) {
  return std::make_unique<FaultyTransport>(std::move(inner), options);
}

}  // namespace minke::transport
