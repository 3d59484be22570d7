#include "services/experts/shard/unit_exchange.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/wire/messages.h"

namespace minke::experts {
namespace {

using transport::FrameRef;
using wire::FrameHeader;
using wire::Kind;

// Of the engine's time, while there are rows to compute. Copying is counted twice: what the transport does
// with a piece costs about as much again.
constexpr double kBusyShare = 0.05;
constexpr absl::Duration kAllowanceMax = absl::Milliseconds(1);
// However slow copying is, a piece is given every 100 ms: the other side would give up.
constexpr absl::Duration kDebtMax = absl::Milliseconds(5);

UnitId UnitOf(const FrameHeader& header) { return {header.layer, header.microbatch}; }

void NameUnit(UnitId unit, FrameHeader& header) {
  header.layer = static_cast<uint16_t>(unit.layer);
  header.microbatch = static_cast<uint16_t>(unit.group);
}

}  // namespace

// ---- fetching, the loader's side

absl::Status UnitExchange::Fetch(UnitId unit, uint64_t layout, const Giver& giver, UnitBuilder& builder) {
  const int64_t bytes = builder.bytes();
  const auto pieces = static_cast<uint32_t>((bytes + wire::kUnitPieceBytes - 1) / wire::kUnitPieceBytes);
  std::vector<bool> there(pieces);
  uint32_t missing = pieces, next = 0, wanted = 0;  // next: to ask for; wanted: asked for and not here
  uint64_t id = 0;
  {
    const MutexLock lock(mutex_);
    if (stop_) return absl::CancelledError("stopping");
    id = next_id_++;
    fetch_.emplace();
    fetch_->id = id;
    fetch_->unit = unit;
    fetch_->layout = layout;
    fetch_->giver = giver;
    fetch_->connect = true;
    rest_ = false;
  }
  const auto ask = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    while (wanted < options_.window && next < pieces) {
      FrameHeader header;
      header.kind = Kind::kUnitRequest;
      header.origin = transport_.self().value;
      header.step = id;
      NameUnit(unit, header);
      while (next < pieces && there[next]) ++next;
      header.row_begin = next;
      while (next < pieces && !there[next] && header.rows < options_.request) ++next, ++header.rows;
      if (header.rows == 0) break;
      header.payload_bytes = sizeof(layout);
      wanted += header.rows;
      fetch_->requests.push_back(header);
    }
    has_mail_.store(true);
  };
  absl::Time progress = absl::Now(), asked = progress;
  std::vector<FrameRef> arrived;
  absl::Status result;
  while (result.ok() && missing > 0) {
    {
      const MutexLock lock(mutex_);
      ask();
    }
    transport_.Wake();
    {
      const MutexLock lock(mutex_);
      mutex_.AwaitFor(options_.ask_again, [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stop_ || !fetch_->failed.ok() || !fetch_->arrived.empty();
      });
      if (stop_) {
        result = absl::CancelledError("stopping");
      } else {
        result = fetch_->failed;
      }
      arrived.assign(std::make_move_iterator(fetch_->arrived.begin()),
                     std::make_move_iterator(fetch_->arrived.end()));
      fetch_->arrived.clear();
    }
    const absl::Time now = absl::Now();
    for (const FrameRef& frame : arrived) {
      const FrameHeader& header = frame.header();
      if (!wire::CheckUnitPiece(bytes, header, frame.payload_span()).ok()) {
        const MutexLock lock(mutex_);
        ++counters_.bad_frames;
        continue;
      }
      if (there[header.row_begin]) continue;
      result.Update(builder.Write(int64_t{header.row_begin} * wire::kUnitPieceBytes, frame.payload_span()));
      if (!result.ok()) break;
      there[header.row_begin] = true;
      --missing;
      if (wanted > 0) --wanted;
      progress = asked = now;
    }
    arrived.clear();
    if (now - progress > options_.stall) {
      result.Update(absl::DeadlineExceededError(StrCat("no piece for ", absl::FormatDuration(options_.stall),
                                                       ", missing ", missing, " of ", pieces)));
    } else if (now - asked > options_.ask_again) {
      next = wanted = 0;
      asked = now;
    }
  }
  const MutexLock lock(mutex_);
  fetch_.reset();
  if (result.ok()) counters_.bytes_fetched += static_cast<uint64_t>(bytes);
  return result;
}

void UnitExchange::Rest() {
  if (!connected_.load()) return;
  {
    const MutexLock lock(mutex_);
    rest_ = true;
    has_mail_.store(true);
  }
  transport_.Wake();
}

void UnitExchange::Stop() {
  const MutexLock lock(mutex_);
  stop_ = true;
}

UnitExchangeCounters UnitExchange::counters() const {
  const MutexLock lock(mutex_);
  return counters_;
}

// ---- fetching, the engine's side

void UnitExchange::SendRequests() {
  if (!has_mail_.load()) return;
  const MutexLock lock(mutex_);
  has_mail_.store(false);
  if (std::exchange(rest_, false) && !fetch_) {
    std::vector<NodeId> unused;
    for (const NodeId peer : connected_by_us_) {
      if (absl::Now() - used_[peer] >= options_.linger) unused.push_back(peer);
    }
    for (const NodeId peer : unused) {
      transport_.Disconnect(peer);
      Forget(peer);
    }
  }
  if (!fetch_) return;
  const NodeId giver = fetch_->giver.node;
  if (std::exchange(fetch_->connect, false) && !up_.contains(giver)) {
    fetch_->failed.Update(transport_.Connect(giver, fetch_->giver.address));
    connected_by_us_.insert(giver);
    connected_.store(true);
    used_[giver] = absl::Now();
  }
  if (!up_.contains(giver)) return;  // OnPeerUp comes back to it
  for (const FrameHeader& header : fetch_->requests) {
    FrameRef frame = transport_.frames().Allocate(sizeof(fetch_->layout));
    frame.header() = header;
    frame.header().traffic_class = wire::TrafficClass::kPrefill;
    std::memcpy(frame.payload(), &fetch_->layout, sizeof(fetch_->layout));
    (void)transport_.Send(giver, std::move(frame));  // what does not arrive is asked for again
  }
  fetch_->requests.clear();
}

void UnitExchange::OnPeerUp(NodeId peer) {
  up_.insert(peer);
  has_mail_.store(true);
}

void UnitExchange::Forget(NodeId peer) {
  up_.erase(peer);
  connected_by_us_.erase(peer);
  connected_.store(!connected_by_us_.empty());
  used_.erase(peer);
}

void UnitExchange::OnPeerLost(NodeId peer) {
  Forget(peer);
  std::erase_if(gives_, [&](const Giving& give) { return give.peer == peer; });
  const MutexLock lock(mutex_);
  if (fetch_ && fetch_->giver.node == peer)
    fetch_->failed.Update(absl::UnavailableError("the giver is lost"));
}

void UnitExchange::OnFrame(NodeId peer, const FrameRef& frame) {
  const FrameHeader& header = frame.header();
  if (header.kind == Kind::kUnitRequest) {
    const absl::StatusOr<uint64_t> layout = wire::ReadUnitRequest(header, frame.payload_span());
    if (layout.ok()) {
      if (std::ssize(gives_) < options_.requests_max) gives_.push_back({peer, header, *layout});
      return;
    }
    const MutexLock lock(mutex_);
    ++counters_.bad_frames;
    return;
  }
  const MutexLock lock(mutex_);
  if (!fetch_ || fetch_->giver.node != peer || fetch_->id != header.step ||
      !(UnitOf(header) == fetch_->unit) || header.origin != transport_.self().value)
    return;
  if (header.kind == Kind::kUnitAbsent) {
    if (wire::CheckUnitAbsent(header, frame.payload_span()).ok()) {
      fetch_->failed.Update(absl::NotFoundError("the giver does not have it, or packs it otherwise"));
    } else {
      ++counters_.bad_frames;
    }
  } else if (std::ssize(fetch_->arrived) < 2 * int64_t{options_.window}) {
    fetch_->arrived.push_back(frame);
    used_[peer] = absl::Now();
  }
}

// ---- giving

absl::Status UnitExchange::GiveOne(const Units& units, absl::FunctionRef<uint64_t(UnitId)> layout_of) {
  Giving& give = gives_.front();
  FrameHeader header = give.request;
  const auto unit = units.find(UnitOf(header));
  const bool here = unit != units.end() && layout_of(unit->first) == give.layout;
  const int64_t bytes = here ? unit->second->bytes() : 0;
  const int64_t begin = int64_t{header.row_begin} * wire::kUnitPieceBytes;
  header.kind = here ? Kind::kUnitPiece : Kind::kUnitAbsent;
  header.credits = 0;
  if (!here || begin >= bytes) {
    if (!here) {
      header.rows = header.row_begin = header.payload_bytes = 0;
      FrameRef frame = transport_.frames().Allocate(0);
      frame.header() = header;
      (void)transport_.Send(give.peer, std::move(frame));
    }
    gives_.pop_front();
    return absl::OkStatus();
  }
  const auto size = static_cast<uint32_t>(std::min<int64_t>(wire::kUnitPieceBytes, bytes - begin));
  FrameRef frame = transport_.frames().Allocate(size);
  header.rows = 1;
  header.pairs = static_cast<uint32_t>((bytes + wire::kUnitPieceBytes - 1) / wire::kUnitPieceBytes);
  header.payload_bytes = size;
  frame.header() = header;
  MK_RETURN_IF_ERROR(unit->second->Read(begin, frame.payload_span()));
  const absl::Status sent = transport_.Send(give.peer, std::move(frame));
  congested_ = absl::IsResourceExhausted(sent);
  if (congested_) return absl::OkStatus();
  if (!sent.ok()) {
    gives_.pop_front();
    return absl::OkStatus();
  }
  used_[give.peer] = absl::Now();
  ++give.request.row_begin;
  if (--give.request.rows > 0) gives_.push_back(give);  // one after the other
  gives_.pop_front();
  const MutexLock lock(mutex_);
  counters_.bytes_given += size;
  return absl::OkStatus();
}

absl::Status UnitExchange::Tick(const Units& units, absl::FunctionRef<uint64_t(UnitId)> layout_of,
                                bool busy) {
  SendRequests();
  if (gives_.empty()) return absl::OkStatus();
  const absl::Time begin = absl::Now();
  allowance_ =
      busy ? std::min(kAllowanceMax, allowance_ + kBusyShare * std::min(begin - last_tick_, absl::Seconds(1)))
           : kAllowanceMax;
  last_tick_ = begin;
  if (allowance_ <= absl::ZeroDuration()) return absl::OkStatus();
  MK_RETURN_IF_ERROR(GiveOne(units, layout_of));
  allowance_ = std::max(allowance_ - 2 * (absl::Now() - begin), -kDebtMax);
  return absl::OkStatus();
}

}  // namespace minke::experts
