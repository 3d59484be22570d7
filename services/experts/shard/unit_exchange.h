// Moves packed units between expert servers: a server that is given a unit can take it from one that has it
// instead of the checkpoint. The fetcher asks for pieces and asks again for those that do not come, so the
// giver remembers nothing but requests it has not answered yet. Messages: docs/wire_format.md; may be lost,
// repeated and reordered.
//
// Giving is the engine thread's: one piece a turn, and while there are rows to compute at most kBusyShare of
// its time. Fetching is the loader's thread: Fetch waits, and copies what the engine thread has received.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "libs/base/mutex.h"
#include "libs/transport/transport.h"
#include "services/experts/shard/unit.h"

namespace minke::experts {

struct UnitExchangeOptions {
  uint32_t window = 32;    // pieces asked for and not yet here: 8 MiB
  uint32_t request = 8;    // pieces of one request; at most wire::kUnitPiecesMax
  int requests_max = 256;  // of others, not answered yet; more are dropped, and asked again
  absl::Duration ask_again = absl::Milliseconds(250);  // without a new piece
  absl::Duration stall = absl::Seconds(3);             // without a new piece: the fetch fails
  absl::Duration linger = absl::Seconds(5);            // a connection made for fetches stays so long unused
};

struct UnitExchangeCounters {
  uint64_t bytes_fetched = 0, bytes_given = 0;
  uint64_t bad_frames = 0;
};

class UnitExchange {
 public:
  // Where a unit can be had.
  struct Giver {
    NodeId node;
    std::string address;  // of its data plane
  };

  // `transport` is borrowed.
  UnitExchange(UnitExchangeOptions options, transport::Transport& transport)
      : options_(options), transport_(transport) {}

  // ---- loader's thread
  // Fills `builder`. NOT_FOUND: the giver has no such unit, or packs it otherwise. UNAVAILABLE: it is gone,
  // or cannot be reached. DEADLINE_EXCEEDED: nothing came for options.stall. CANCELLED: Stop. INTERNAL: the
  // builder's.
  absl::Status Fetch(UnitId unit, uint64_t layout, const Giver& giver, UnitBuilder& builder);
  // Nothing is fetched now: lets go of connections made for it that were not used for options.linger. To be
  // called now and then.
  void Rest();

  // ---- engine thread
  static bool IsUnitKind(wire::Kind kind) {
    return kind >= wire::Kind::kUnitRequest && kind <= wire::Kind::kUnitAbsent;
  }
  void OnFrame(NodeId peer, const transport::FrameRef& frame);
  void OnPeerUp(NodeId peer);
  void OnPeerLost(NodeId peer);
  // A turn. `layout_of` names the layout of a unit that is in `units`. `busy`: there are rows to compute.
  // INTERNAL: the device is lost.
  absl::Status Tick(const Units& units, absl::FunctionRef<uint64_t(UnitId)> layout_of, bool busy);
  // There is something to give in the next turn: do not sleep.
  bool Due() const { return !gives_.empty() && !congested_; }

  // ---- any thread
  void Stop();
  UnitExchangeCounters counters() const;

 private:
  struct Fetching {
    uint64_t id = 0;
    UnitId unit;
    uint64_t layout = 0;
    Giver giver;
    bool connect = false;                     // the engine is to connect
    std::vector<wire::FrameHeader> requests;  // to send
    std::deque<transport::FrameRef> arrived;
    absl::Status failed;
  };
  struct Giving {
    NodeId peer;
    wire::FrameHeader request;  // pieces [row_begin, row_begin + rows) are still to be sent
    uint64_t layout = 0;
  };
  void SendRequests();
  void Forget(NodeId peer);
  absl::Status GiveOne(const Units& units, absl::FunctionRef<uint64_t(UnitId)> layout_of);

  const UnitExchangeOptions options_;
  transport::Transport& transport_;

  // The engine's.
  absl::flat_hash_set<NodeId> up_;
  absl::flat_hash_set<NodeId> connected_by_us_;
  std::map<NodeId, absl::Time> used_;  // last piece from or to a peer
  std::deque<Giving> gives_;
  bool congested_ = false;  // the last piece did not fit the transport's queue
  absl::Time last_tick_ = absl::InfinitePast();
  absl::Duration allowance_;  // time that giving may take while there are rows to compute

  std::atomic<bool> connected_{false};  // connected_by_us_ is not empty
  std::atomic<bool> has_mail_{false};   // so that a turn without news takes no lock
  mutable Mutex mutex_;
  std::optional<Fetching> fetch_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  bool rest_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  UnitExchangeCounters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace minke::experts
