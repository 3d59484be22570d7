// Keeps a node connected to the peers it needs: connects to new members, reconnects to lost ones with a
// pause, and lets go of those that left. A connection that works outlives its membership for a while: after a
// router's restart the view is empty until everybody has joined again, and nothing must break meanwhile.
// Engine thread only.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "libs/transport/transport.h"

namespace minke::cluster {

class PeerKeeper {
 public:
  explicit PeerKeeper(transport::Transport& transport) : transport_(transport) {}

  // The members this node needs, by address. Replaces the earlier set.
  void SetWanted(std::map<NodeId, std::string> wanted);
  // To be told of every kPeerUp and kPeerLost.
  void OnPeerUp(NodeId peer);
  void OnPeerLost(NodeId peer);
  // Starts what is due. Returns the peers let go of just now: their transport will not report them lost.
  std::vector<NodeId> Tick(absl::Time now);

  bool IsUp(NodeId peer) const;
  // Wanted peers that have been up, and have not been for so long.
  std::vector<NodeId> LostFor(absl::Duration time, absl::Time now) const;

 private:
  struct Peer {
    std::string address;
    bool wanted = true;
    bool up = false;
    bool connecting = false;
    absl::Time unwanted_since;
    absl::Time lost_at = absl::InfiniteFuture();  // until it is up again
    absl::Time next_try = absl::InfinitePast();
    absl::Duration pause = absl::Milliseconds(50);
  };
  transport::Transport& transport_;
  std::map<NodeId, Peer> peers_;
};

}  // namespace minke::cluster
