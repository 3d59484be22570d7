#include "services/attention/latent_cache/page_exchange.h"

#include <algorithm>
#include <cstring>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::attention {
namespace {

using transport::FrameRef;
using wire::FrameHeader;
using wire::Kind;

static_assert(wire::kPageTokens == kernels::kPageTokens);

void ReleaseFromTheEnd(PagePool& pool, std::span<const uint32_t> pages) {
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) pool.Release(*page);
}

}  // namespace

PageExchange::PageExchange(PageExchangeOptions options, PageMemory& memory, PagePool& pages,
                           transport::Transport& transport)
    : options_(options),
      memory_(memory),
      pages_(pages),
      transport_(transport),
      shape_{.layers = memory.page_layers(), .layer_bytes = memory.page_layer_bytes()} {}

absl::Status PageExchange::SendFrame(NodeId peer, const FrameHeader& fields,
                                     std::span<const std::byte> payload) {
  FrameRef frame = transport_.frames().Allocate(static_cast<uint32_t>(payload.size()));
  frame.header() = fields;
  frame.header().traffic_class = wire::TrafficClass::kPrefill;
  frame.header().payload_bytes = static_cast<uint32_t>(payload.size());
  if (!payload.empty()) std::memcpy(frame.payload(), payload.data(), payload.size());
  return transport_.Send(peer, std::move(frame));
}

// ---- fetching

void PageExchange::Fetch(Request request) { waiting_.push_back(std::move(request)); }

void PageExchange::Cancel(const RequestKey& key) {
  std::erase_if(waiting_, [&](const Request& request) { return request.key == key; });
  std::erase_if(fetches_, [&](Fetching& fetch) {
    if (fetch.request.key != key) return false;
    LetGo(fetch);
    return true;
  });
}

void PageExchange::CancelSession(uint64_t session) {
  std::erase_if(waiting_, [&](const Request& request) { return request.key.session == session; });
  std::erase_if(fetches_, [&](Fetching& fetch) {
    if (fetch.request.key.session != session) return false;
    LetGo(fetch);
    return true;
  });
}

PageExchange::Fetching* PageExchange::FindFetch(NodeId giver, const FrameHeader& header) {
  const auto found = std::find_if(fetches_.begin(), fetches_.end(),
                                  [&](const Fetching& fetch) { return fetch.id == header.step; });
  return found == fetches_.end() || GiverOf(*found) != giver || header.origin != transport_.self().value
             ? nullptr
             : &*found;
}

void PageExchange::Begin(Request request, absl::Time now) {
  Fetching& fetch = fetches_.emplace_back();
  fetch.id = next_id_++;
  fetch.progress = now;
  fetch.request = std::move(request);
  const SamplingParams& sampling = fetch.request.sampling;
  // Prompt log-probabilities need every row, so pages would not be used.
  fetch.sized = !options_.enabled || !shape_.Fits() || sampling.want_prompt_logprobs;
  const auto node = nodes_.find(GiverOf(fetch));
  fetch.failed = node == nodes_.end() || node->first == transport_.self();
  if (fetch.sized || fetch.failed) return;
  fetch.address = node->second;
  fetch.tokens = fetch.request.prompt;
  fetch.tokens.insert(fetch.tokens.end(), fetch.request.generated.begin(), fetch.request.generated.end());
  // The last token is computed in any case: its logits are wanted.
  fetch.tokens.resize(std::min<size_t>((fetch.tokens.size() - 1) / wire::kPageTokens, wire::kPagesMax) *
                      wire::kPageTokens);
  fetch.held = pages_.Match(fetch.tokens, fetch.published);
  if (fetch.held.size() * wire::kPageTokens == fetch.tokens.size()) {
    fetch.sized = true;  // all there
    return;
  }
  peers_changed_ = true;
  if (up_.contains(GiverOf(fetch))) return Ask(fetch);
  connected_by_us_.insert(GiverOf(fetch));
}

void PageExchange::Ask(Fetching& fetch) {
  FrameHeader header;
  header.kind = Kind::kPageRequest;
  header.origin = transport_.self().value;
  header.step = fetch.id;
  header.rows = static_cast<uint32_t>(fetch.tokens.size());
  header.row_begin = static_cast<uint32_t>(fetch.held.size());
  fetch.asked = true;
  fetch.failed = !SendFrame(GiverOf(fetch), header, std::as_bytes(std::span(fetch.tokens))).ok();
}

void PageExchange::LayOut(Fetching& fetch, uint32_t pages) {
  fetch.sized = true;
  const size_t all = std::min<size_t>(pages, fetch.tokens.size() / wire::kPageTokens);
  const size_t wanted = all - std::min(all, fetch.held.size());
  const size_t free = static_cast<size_t>(std::max<int64_t>(0, pages_.available() - pages_reserved_));
  fetch.cut = wanted > free;
  for (size_t i = 0; i < std::min(wanted, free); ++i) {
    const std::optional<uint32_t> page = pages_.Take();
    MK_CHECK(page.has_value());
    fetch.arriving.push_back({*page, shape_.layers, std::vector<bool>(shape_.layers)});
  }
}

void PageExchange::Store(Fetching& fetch, const FrameHeader& header, const std::byte* latents,
                         absl::Time now) {
  if (!fetch.sized) LayOut(fetch, header.pairs);
  const size_t index = header.row_begin - fetch.held.size();  // huge for pages that are here
  if (index >= fetch.arriving.size()) {
    ++fetch.taken;  // there was no page for it
    return;
  }
  Arriving& arriving = fetch.arriving[index];
  bool fresh = false;
  for (uint32_t i = 0; i < header.rows; ++i) {
    const int32_t layer = header.layer + static_cast<int32_t>(i);
    if (arriving.layer_there[layer]) continue;
    arriving.layer_there[layer] = true;
    --arriving.layers_missing;
    memory_.WritePage(layer, arriving.page, latents + i * shape_.layer_bytes);
    fresh = true;
  }
  if (!fresh) return;
  ++fetch.taken;
  fetch.progress = now;
  while (fetch.num_published < fetch.arriving.size() &&
         fetch.arriving[fetch.num_published].layers_missing == 0) {
    const size_t page = fetch.held.size() + fetch.num_published;
    fetch.published =
        pages_.Publish(fetch.arriving[fetch.num_published++].page, fetch.published,
                       std::span(fetch.tokens).subspan(page * wire::kPageTokens, wire::kPageTokens));
    ++counters_.pages_fetched;
  }
}

void PageExchange::TakeReceived(absl::Time now) {
  for (int64_t bytes = 0; !received_.empty() && bytes < options_.turn_bytes;) {
    const Received received = std::move(received_.front());
    received_.pop_front();
    const FrameHeader& header = received.frame.header();
    Fetching* fetch = FindFetch(received.peer, header);
    if (fetch == nullptr) continue;
    Store(*fetch, header, received.frame.payload(), now);
    bytes += header.payload_bytes;
    if (fetch->taken - fetch->acknowledged < std::max(1u, options_.window / 4)) continue;
    FrameHeader ack;
    ack.kind = Kind::kPageAck;
    ack.origin = transport_.self().value;
    ack.step = fetch->id;
    ack.row_begin = fetch->acknowledged = fetch->taken;
    (void)SendFrame(received.peer, ack);  // a peer that is gone is reported lost
  }
}

// Gives back what the fetch holds; what came in one piece stays findable.
void PageExchange::LetGo(Fetching& fetch) {
  if (fetch.asked && (!fetch.Complete() || fetch.cut)) {
    FrameHeader stop;
    stop.kind = Kind::kPageRequest;
    stop.origin = transport_.self().value;
    stop.step = fetch.id;
    (void)SendFrame(GiverOf(fetch), stop);  // one that is gone sends nothing more
  }
  for (auto page = fetch.arriving.rbegin(); page != fetch.arriving.rend(); ++page) pages_.Release(page->page);
  ReleaseFromTheEnd(pages_, fetch.held);
  peers_changed_ = true;
}

void PageExchange::EndFetches(absl::Time now, std::vector<Request>& over) {
  for (auto fetch = fetches_.begin(); fetch != fetches_.end();) {
    // A giver cannot be blamed for what has come and was not yet looked at.
    const bool stalled = now - fetch->progress > options_.fetch_stall &&
                         std::none_of(received_.begin(), received_.end(), [&](const Received& received) {
                           return received.frame.header().step == fetch->id;
                         });
    const bool late = fetch->request.waiting_until < now;
    if (!fetch->Complete() && !fetch->failed && !stalled && !late) {
      ++fetch;
      continue;
    }
    const bool nothing = fetch->asked && fetch->arriving.empty();
    if (!fetch->Complete() || fetch->cut || nothing) {
      ++counters_.fetches_failed;
      log::Info("latent_cache", StrCat("pages of a sequence did not all come from=",
                                       ToString(GiverOf(*fetch)), " pages=", fetch->num_published, " of ",
                                       fetch->tokens.size() / wire::kPageTokens - fetch->held.size()));
    }
    // The others that want something from it would wait as long, and as much in vain.
    const NodeId giver = GiverOf(*fetch);
    const bool dead = !fetch->Complete() && !late;
    LetGo(*fetch);
    over.push_back(std::move(fetch->request));
    fetch = fetches_.erase(fetch);
    if (!dead) continue;
    for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
      if (waiting->pages_from != giver) {
        ++waiting;
        continue;
      }
      ++counters_.fetches_failed;
      over.push_back(std::move(*waiting));
      waiting = waiting_.erase(waiting);
    }
  }
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    if (waiting->waiting_until >= now) {
      ++waiting;
      continue;
    }
    over.push_back(std::move(*waiting));
    waiting = waiting_.erase(waiting);
  }
}

std::vector<Request> PageExchange::Tick(absl::Time now, int64_t pages_reserved) {
  std::vector<Request> over;
  if (Idle()) return over;
  pages_reserved_ = pages_reserved;
  TakeReceived(now);
  EndFetches(now, over);
  while (!waiting_.empty() && std::ssize(fetches_) < options_.fetches_max) {
    Request request = std::move(waiting_.front());
    waiting_.pop_front();
    Begin(std::move(request), now);
    EndFetches(now, over);  // what needs no fetch makes room at once
  }
  Give(now);
  return over;
}

bool PageExchange::Due() const {
  return !received_.empty() || std::any_of(fetches_.begin(), fetches_.end(), [](const Fetching& fetch) {
    return fetch.Complete() || fetch.failed;
  }) || std::any_of(gives_.begin(), gives_.end(), [&](const Giving& give) {
    return give.sent - give.acknowledged < options_.window;
  });
}

std::map<NodeId, std::string> PageExchange::WantedPeers() const {
  std::map<NodeId, std::string> wanted;
  for (const Fetching& fetch : fetches_) {
    // A connection that the other side made is the other side's to keep.
    if (connected_by_us_.contains(GiverOf(fetch))) wanted[GiverOf(fetch)] = fetch.address;
  }
  return wanted;
}

void PageExchange::OnPeerUp(NodeId peer) {
  up_.insert(peer);
  for (Fetching& fetch : fetches_) {
    if (GiverOf(fetch) == peer && !fetch.asked && !fetch.sized && !fetch.failed) Ask(fetch);
  }
}

void PageExchange::OnPeerLost(NodeId peer) {
  up_.erase(peer);
  connected_by_us_.erase(peer);
  std::erase_if(received_, [&](const Received& received) { return received.peer == peer; });
  for (Fetching& fetch : fetches_) fetch.failed |= GiverOf(fetch) == peer;
  std::erase_if(gives_, [&](Giving& give) {
    if (give.peer != peer) return false;
    LetGo(give);
    return true;
  });
}

// ---- giving

void PageExchange::OnRequest(NodeId peer, const FrameHeader& header, std::span<const uint32_t> tokens) {
  const auto known = std::find_if(gives_.begin(), gives_.end(), [&](const Giving& give) {
    return give.peer == peer && give.id == header.step;
  });
  if (tokens.empty()) {
    if (known == gives_.end()) return;
    LetGo(*known);
    gives_.erase(known);
    return;
  }
  if (known != gives_.end()) return;
  std::vector<uint32_t> pages;
  if (options_.enabled && shape_.Fits() && std::ssize(gives_) < options_.gives_max) {
    Prefix prefix;
    pages = pages_.Match(tokens, prefix);
  }
  if (pages.size() <= header.row_begin) {
    FrameHeader end;
    end.kind = Kind::kPageEnd;
    end.origin = peer.value;
    end.step = header.step;
    end.pairs = static_cast<uint32_t>(pages.size());
    (void)SendFrame(peer, end);
    return ReleaseFromTheEnd(pages_, pages);
  }
  ReleaseFromTheEnd(pages_, std::span(pages).first(header.row_begin));
  pages.erase(pages.begin(), pages.begin() + header.row_begin);
  Giving give;
  give.peer = peer;
  give.id = header.step;
  give.pages = std::move(pages);
  give.first = header.row_begin;
  give.progress = absl::Now();
  gives_.push_back(std::move(give));
}

absl::Status PageExchange::SendSlice(Giving& give) {
  const int32_t layers = std::min(shape_.layers - give.layer, shape_.LayersMax());
  FrameRef frame = transport_.frames().Allocate(static_cast<uint32_t>(layers * shape_.layer_bytes));
  FrameHeader& header = frame.header();
  header.kind = Kind::kPageTransfer;
  header.traffic_class = wire::TrafficClass::kPrefill;
  header.origin = give.peer.value;
  header.step = give.id;
  header.layer = static_cast<uint16_t>(give.layer);
  header.rows = static_cast<uint32_t>(layers);
  header.row_begin = give.first + static_cast<uint32_t>(give.page_index);
  header.pairs = give.first + static_cast<uint32_t>(give.pages.size());
  for (int32_t i = 0; i < layers; ++i) {
    memory_.ReadPage(give.layer + i, give.pages[give.page_index], frame.payload() + i * shape_.layer_bytes);
  }
  MK_RETURN_IF_ERROR(transport_.Send(give.peer, std::move(frame)));
  ++give.sent;
  give.layer += layers;
  if (give.layer < shape_.layers) return absl::OkStatus();
  give.layer = 0;
  ++give.page_index;
  ++counters_.pages_given;
  return absl::OkStatus();
}

void PageExchange::Give(absl::Time now) {
  const auto end = [&](std::list<Giving>::iterator give) {
    LetGo(*give);
    return gives_.erase(give);
  };
  int64_t bytes = 0;
  for (bool more = true; more && bytes < options_.turn_bytes;) {
    more = false;
    for (auto give = gives_.begin(); give != gives_.end() && bytes < options_.turn_bytes;) {
      if (give->sent - give->acknowledged >= options_.window) {
        ++give;
        continue;
      }
      const absl::Status sent = SendSlice(*give);
      if (absl::IsResourceExhausted(sent)) return;  // the next turn
      if (!sent.ok()) {
        give = end(give);
        continue;
      }
      more = true;
      bytes += shape_.LayersMax() * shape_.layer_bytes;
      if (give->page_index < give->pages.size()) {
        ++give;
        continue;
      }
      FrameHeader done;
      done.kind = Kind::kPageEnd;
      done.origin = give->peer.value;
      done.step = give->id;
      done.pairs = give->first + static_cast<uint32_t>(give->pages.size());
      (void)SendFrame(give->peer, done);
      give = end(give);
    }
    // One after the other gets the first turn.
    if (gives_.size() > 1) gives_.splice(gives_.end(), gives_, gives_.begin());
  }
  for (auto give = gives_.begin(); give != gives_.end();) {
    give = now - give->progress > options_.give_stall ? end(give) : std::next(give);
  }
}

void PageExchange::LetGo(Giving& give) { ReleaseFromTheEnd(pages_, give.pages); }

// ---- frames

void PageExchange::OnFrame(NodeId peer, const FrameRef& frame) {
  const FrameHeader& header = frame.header();
  const auto bad = [&](const absl::Status& status) {
    if (!status.ok()) ++counters_.bad_frames;
    return !status.ok();
  };
  if (header.kind == Kind::kPageRequest) {
    const auto tokens = wire::ReadPageRequest(header, frame.payload_span());
    if (!bad(tokens.status())) OnRequest(peer, header, *tokens);
  } else if (header.kind == Kind::kPageTransfer) {
    if (bad(wire::ReadPageTransfer(shape_, header, frame.payload_span()).status())) return;
    if (FindFetch(peer, header) == nullptr) {
      FrameHeader stop;
      stop.kind = Kind::kPageRequest;
      stop.origin = transport_.self().value;
      stop.step = header.step;
      (void)SendFrame(peer, stop);
    } else if (std::ssize(received_) < int64_t{options_.fetches_max} * 2 * options_.window) {
      received_.push_back({peer, frame});
    }
  } else if (header.kind == Kind::kPageEnd) {
    if (bad(wire::CheckPageEnd(header, frame.payload_span()))) return;
    Fetching* fetch = FindFetch(peer, header);
    if (fetch != nullptr && fetch->asked && !fetch->sized) LayOut(*fetch, header.pairs);
  } else if (header.kind == Kind::kPageAck) {
    if (bad(wire::CheckPageAck(header, frame.payload_span()))) return;
    for (Giving& give : gives_) {
      if (give.peer != peer || give.id != header.step) continue;
      const uint32_t acknowledged = std::min(header.row_begin, give.sent);
      if (acknowledged <= give.acknowledged) continue;
      give.acknowledged = acknowledged;
      give.progress = absl::Now();
    }
  }
}

}  // namespace minke::attention
