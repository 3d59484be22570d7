// Moves latent cache pages between attention nodes, so that a sequence that changes its node is not computed
// again. Both sides of it: a node asks the one that had the sequence for the pages of the longest prefix it
// lacks (fetch), and gives others what it has (give). Pages are named by the tokens they hold, and fetched
// ones become ordinary published pages: the sequence then finds them as it finds any others.
//
// Nothing depends on it. A fetch that is refused, lost, cut off or too slow hands its request over all the
// same, with the pages that came in one piece from the beginning; the scheduler computes the rest. Messages:
// docs/wire_format.md; may be lost, repeated and reordered. How fast the engine's turns are decides how fast
// pages move: no turn copies more than turn_bytes each way. Engine thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "libs/transport/transport.h"
#include "libs/wire/messages.h"
#include "services/attention/latent_cache/page_memory.h"
#include "services/attention/latent_cache/page_pool.h"
#include "services/attention/scheduler/sequence.h"

namespace minke::attention {

struct PageExchangeOptions {
  bool enabled = true;  // false: requests are handed over as they come, and others are given nothing
  // 8 MiB at 2 GB/s, the slowest copy there is (unpinned memory to a GPU, layer by layer), take 4 ms.
  int64_t turn_bytes = 8 << 20;                   // read, and as many written, in one turn of the engine
  int fetches_max = 4;                            // under way; more wait their turn
  int gives_max = 32;                             // under way; more are refused
  uint32_t window = 32;                           // transfers of one give that the fetcher has not taken yet
  absl::Duration fetch_stall = absl::Seconds(1);  // without progress: hand over what has come
  absl::Duration give_stall = absl::Seconds(10);  // without an answer: let go of the pages
};

struct PageExchangeCounters {
  uint64_t pages_fetched = 0, pages_given = 0;
  uint64_t fetches_failed = 0;  // that did not get every page they could use
  uint64_t bad_frames = 0;
};

class PageExchange {
 public:
  // All borrowed.
  PageExchange(PageExchangeOptions options, PageMemory& memory, PagePool& pages,
               transport::Transport& transport);

  // Takes a request whose pages `request.pages_from` may have; Tick gives it back.
  void Fetch(Request request);
  void Cancel(const RequestKey& key);
  void CancelSession(uint64_t session);

  static bool IsPageKind(wire::Kind kind) {
    return kind >= wire::Kind::kPageRequest && kind <= wire::Kind::kPageAck;
  }
  void OnFrame(NodeId peer, const transport::FrameRef& frame);
  void OnPeerUp(NodeId peer);
  void OnPeerLost(NodeId peer);
  // Where the attention nodes are.
  void SetNodes(std::map<NodeId, std::string> nodes) { nodes_ = std::move(nodes); }

  // A turn: sends and takes slices of pages. Returns the requests whose fetch is over, in the order in which
  // they came to an end. `pages_reserved` free pages are left for the sequences that run.
  std::vector<Request> Tick(absl::Time now, int64_t pages_reserved);
  // There is something to copy in the next turn: do not sleep.
  bool Due() const;
  bool Idle() const { return waiting_.empty() && fetches_.empty() && gives_.empty() && received_.empty(); }

  // The peers to connect to, and whether they may be others than at the last call.
  std::map<NodeId, std::string> WantedPeers() const;
  bool TakePeersChanged() { return std::exchange(peers_changed_, false); }

  int64_t fetching() const { return std::ssize(waiting_) + std::ssize(fetches_); }
  int64_t giving() const { return std::ssize(gives_); }
  const PageExchangeCounters& counters() const { return counters_; }

 private:
  // A page on its way here.
  struct Arriving {
    uint32_t page = 0;
    int32_t layers_missing = 0;
    std::vector<bool> layer_there;
  };
  struct Fetching {
    Request request;
    uint64_t id = 0;
    std::string address;             // of the giver
    std::vector<uint32_t> tokens;    // of the prefix it is about, whole pages
    std::vector<uint32_t> held;      // its beginning, which is here; one reference to each
    Prefix published;                // what `held` and the published ones of `arriving` hold
    std::vector<Arriving> arriving;  // the pages after it; one reference to each
    size_t num_published = 0;        // of `arriving`, from its beginning
    bool asked = false;
    bool sized = false;                    // what the giver has is known, and `arriving` is laid out
    bool cut = false;                      // free pages did not suffice for all of it
    bool failed = false;                   // nothing more will come
    uint32_t taken = 0, acknowledged = 0;  // transfers
    absl::Time progress;
    bool Complete() const { return sized && num_published == arriving.size(); }
  };
  struct Giving {
    NodeId peer;
    uint64_t id = 0;
    std::vector<uint32_t> pages;  // of the prefix, from page `first`; one reference to each
    uint32_t first = 0;
    size_t page_index = 0;  // next slice
    int32_t layer = 0;
    uint32_t sent = 0, acknowledged = 0;  // transfers
    absl::Time progress;
  };
  struct Received {
    NodeId peer;
    transport::FrameRef frame;
  };

  NodeId GiverOf(const Fetching& fetch) const { return fetch.request.pages_from; }
  Fetching* FindFetch(NodeId giver, const wire::FrameHeader& header);
  void Begin(Request request, absl::Time now);
  void Ask(Fetching& fetch);
  // The giver has `pages` pages of the prefix: takes pages for those that are not here.
  void LayOut(Fetching& fetch, uint32_t pages);
  void Store(Fetching& fetch, const wire::FrameHeader& header, const std::byte* latents, absl::Time now);
  void TakeReceived(absl::Time now);
  void EndFetches(absl::Time now, std::vector<Request>& over);
  void LetGo(Fetching& fetch);
  void OnRequest(NodeId peer, const wire::FrameHeader& header, std::span<const uint32_t> tokens);
  void Give(absl::Time now);
  absl::Status SendSlice(Giving& give);
  void LetGo(Giving& give);
  absl::Status SendFrame(NodeId peer, const wire::FrameHeader& fields,
                         std::span<const std::byte> payload = {});

  const PageExchangeOptions options_;
  PageMemory& memory_;
  PagePool& pages_;
  transport::Transport& transport_;
  const wire::PageShape shape_;
  std::map<NodeId, std::string> nodes_;
  absl::flat_hash_set<NodeId> up_;
  absl::flat_hash_set<NodeId> connected_by_us_;  // or on their way
  bool peers_changed_ = false;
  int64_t pages_reserved_ = 0;
  std::deque<Request> waiting_;  // for a place among fetches_
  std::list<Fetching> fetches_;
  std::list<Giving> gives_;
  std::deque<Received> received_;  // transfers not yet taken
  uint64_t next_id_ = 1;
  PageExchangeCounters counters_;
};

}  // namespace minke::attention
