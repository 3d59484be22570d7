#include "libs/cluster/peer_keeper.h"

#include <algorithm>
#include <vector>

#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::cluster {
namespace {

constexpr absl::Duration kPauseMin = absl::Milliseconds(50), kPauseMax = absl::Seconds(2);
// After it a peer that is no member any more is let go of, though its connection works.
constexpr absl::Duration kGrace = absl::Seconds(5);

}  // namespace

void PeerKeeper::SetWanted(std::map<NodeId, std::string> wanted) {
  for (auto& [peer, state] : peers_) {
    if (state.wanted && !wanted.contains(peer)) state.unwanted_since = absl::Now();
    state.wanted = wanted.contains(peer);
  }
  for (auto& [peer, address] : wanted) peers_[peer].address = std::move(address);
}

void PeerKeeper::OnPeerUp(NodeId peer) {
  auto it = peers_.find(peer);
  if (it == peers_.end()) return;  // it connected to us; nobody told us yet what for
  it->second.up = true;
  it->second.connecting = false;
  it->second.lost_at = absl::InfiniteFuture();
  it->second.pause = kPauseMin;
}

void PeerKeeper::OnPeerLost(NodeId peer) {
  auto it = peers_.find(peer);
  if (it == peers_.end()) return;
  Peer& state = it->second;
  if (!state.wanted) {
    peers_.erase(it);
    return;
  }
  if (state.up) state.lost_at = absl::Now();
  state.up = state.connecting = false;
  state.next_try = absl::Now() + state.pause;
  state.pause = std::min(state.pause * 2, kPauseMax);
}

std::vector<NodeId> PeerKeeper::Tick(absl::Time now) {
  std::vector<NodeId> dropped;
  for (auto it = peers_.begin(); it != peers_.end();) {
    auto& [peer, state] = *it;
    if (!state.wanted) {
      if (state.up && now - state.unwanted_since < kGrace) {
        ++it;
        continue;
      }
      transport_.Disconnect(peer);
      dropped.push_back(peer);
      it = peers_.erase(it);
      continue;
    }
    ++it;
    if (state.up || state.connecting || now < state.next_try) continue;
    if (absl::Status status = transport_.Connect(peer, state.address); !status.ok()) {
      log::Warning("cluster", StrCat("cannot connect peer=", ToString(peer), " address=", state.address, ": ",
                                     status.message()));
      state.next_try = now + state.pause;
      state.pause = std::min(state.pause * 2, kPauseMax);
      continue;
    }
    state.connecting = true;
  }
  return dropped;
}

bool PeerKeeper::IsUp(NodeId peer) const {
  auto it = peers_.find(peer);
  return it != peers_.end() && it->second.up;
}

std::vector<NodeId> PeerKeeper::LostFor(absl::Duration time, absl::Time now) const {
  std::vector<NodeId> lost;
  for (const auto& [peer, state] : peers_) {
    if (state.wanted && !state.up && now - state.lost_at >= time) lost.push_back(peer);
  }
  return lost;
}

}  // namespace minke::cluster
