#include "cli/bench/frame_bench.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/time/clock.h"
#include "cli/bench/statistics.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli::bench {
namespace {

using transport::Event;
using transport::FrameRef;
using transport::Transport;
using wire::TrafficClass;

constexpr absl::Duration kTimeout = absl::Seconds(20);  // of anything that should take far less
constexpr absl::Duration kOutOfCredit = absl::Microseconds(20);
constexpr uint32_t kRowBytes = 10 * 1024;  // DeepSeek-V2: 5,120 numbers of 2 bytes
constexpr int64_t kRoundTripsMin = 50;

// What the server does with a Dispatch frame, in its `layer`. Frames overtake each other: the end of a stream
// says how long it was (`pairs`).
enum Mode : uint16_t { kEcho, kSwallow, kSwallowed, kSend };

uint32_t Rows(uint32_t payload_bytes) { return std::max<uint32_t>(1, payload_bytes / kRowBytes); }

// What a sender of activations writes anew; the rest of the payload is what the buffer last held.
void Touch(const FrameRef& frame) {
  std::memset(frame.payload(), 1, std::min<size_t>(64, frame.payload_span().size()));
}

// Sends within the limits of credit and of sends under way.
class LimitedSender {
 public:
  explicit LimitedSender(Transport& transport) : transport_(transport) {}
  // False: not now.
  bool TrySend(NodeId to, const FrameRef& frame) {
    const uint32_t rows = frame.header().rows;
    if (!credit_taken_) credit_taken_ = transport_.TakeCredit(to, TrafficClass::kDecode, rows);
    if (!credit_taken_ || !transport_.Send(to, frame).ok()) return false;
    credit_taken_ = false;
    return true;
  }

 private:
  Transport& transport_;
  bool credit_taken_ = false;  // for the next frame; those of one stream have the same rows
};

class FrameServer {
 public:
  explicit FrameServer(Transport& transport) : transport_(transport), sender_(transport) {}

  void Run(const std::atomic<bool>& stop) {
    bool lost = false;
    while (!lost && !stop.load(std::memory_order_relaxed)) {
      while (to_send_ > 0 && sender_.TrySend(client_, MakePartial(send_bytes_, kSend))) --to_send_;
      transport_.Wait(to_send_ > 0 ? kOutOfCredit : absl::Milliseconds(100));
      transport_.Poll([&](Event& event) {
        lost |= event.kind == Event::Kind::kPeerLost;
        if (event.kind == Event::Kind::kFrame) Take(event);
      });
    }
  }

 private:
  void Take(Event& event) {
    const wire::FrameHeader& header = event.frame.header();
    if (header.kind != wire::Kind::kDispatch) return;
    client_ = event.peer;
    if (header.step != run_) {
      run_ = header.step;
      swallowed_ = expected_ = to_send_ = 0;
    }
    switch (header.layer) {
      case kEcho:
        transport_.Send(client_, MakePartial(header.payload_bytes, kEcho)).IgnoreError();
        return;
      case kSwallow:
        ++swallowed_;
        transport_.ReturnCredit(client_, header.traffic_class, header.rows);
        break;
      case kSwallowed:
        expected_ = header.pairs;
        break;
      case kSend:
        to_send_ = header.pairs;
        send_bytes_ = header.payload_bytes;
        return;
      default:
        return;
    }
    if (expected_ > 0 && swallowed_ == expected_) {
      expected_ = 0;
      transport_.Send(client_, MakePartial(0, kSwallowed)).IgnoreError();
    }
  }

  FrameRef MakePartial(uint32_t payload_bytes, Mode mode) {
    FrameRef frame = transport_.frames().Allocate(payload_bytes);
    frame.header().kind = wire::Kind::kPartial;
    frame.header().step = run_;
    frame.header().layer = mode;
    frame.header().rows = Rows(payload_bytes);
    Touch(frame);
    return frame;
  }

  Transport& transport_;
  LimitedSender sender_;
  NodeId client_;
  uint64_t run_ = 0;
  int64_t swallowed_ = 0, expected_ = 0, to_send_ = 0;
  uint32_t send_bytes_ = 0;
};

}  // namespace

void ServeFrames(Transport& transport, const std::atomic<bool>& stop) { FrameServer(transport).Run(stop); }

void FrameClient::Step(absl::Duration timeout) {
  transport_.Wait(timeout);
  transport_.Poll([&](Event& event) {
    switch (event.kind) {
      case Event::Kind::kPeerUp:
        up_ = true;
        break;
      case Event::Kind::kPeerLost:
        up_ = false;
        lost_ = absl::UnavailableError(StrCat("the other node is lost: ", event.reason.message()));
        break;
      case Event::Kind::kFrame: {
        const wire::FrameHeader& header = event.frame.header();
        if (header.kind != wire::Kind::kPartial || header.step != run_) break;
        ++partials_;
        if (header.layer == kSend) transport_.ReturnCredit(event.peer, header.traffic_class, header.rows);
        break;
      }
    }
  });
}

template <typename Done>
absl::Status FrameClient::Until(Done done, absl::Time deadline, const char* what) {
  while (!done()) {
    MK_RETURN_IF_ERROR(lost_);
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration())
      return absl::DeadlineExceededError(StrCat(what, ": nothing came in ", absl::FormatDuration(kTimeout)));
    Step(std::min(left, absl::Seconds(1)));
  }
  return absl::OkStatus();
}

absl::Status FrameClient::Connect(const std::string& address) {
  MK_RETURN_IF_ERROR(transport_.Connect(kFrameServerId, address));
  return Until([&] { return up_; }, absl::Now() + kTimeout, "connecting");
}

FrameRef FrameClient::MakeDispatch(uint32_t payload_bytes) {
  FrameRef frame = transport_.frames().Allocate(payload_bytes);
  frame.header().kind = wire::Kind::kDispatch;
  frame.header().step = run_;
  frame.header().rows = Rows(payload_bytes);
  Touch(frame);
  return frame;
}

absl::StatusOr<FrameClient::RoundTrips> FrameClient::MeasureRoundTrips(uint32_t payload_bytes,
                                                                       absl::Duration time) {
  ++run_;
  partials_ = 0;
  std::vector<double> times_us;
  const absl::Time warm = absl::Now() + time / 10, deadline = warm + time + kTimeout;
  for (absl::Time end = warm + time;;) {
    const absl::Time now = absl::Now();
    if (now >= end && std::ssize(times_us) >= kRoundTripsMin) break;
    const int64_t awaited = partials_ + 1;
    FrameRef frame = MakeDispatch(payload_bytes);
    const auto begin = Clock::now();
    MK_RETURN_IF_ERROR(transport_.Send(kFrameServerId, std::move(frame)));
    MK_RETURN_IF_ERROR(Until([&] { return partials_ >= awaited; }, deadline, "round trip"));
    const std::chrono::duration<double, std::micro> took = Clock::now() - begin;
    if (now >= warm) times_us.push_back(took.count());
  }
  return RoundTrips{std::ssize(times_us), Percentile(times_us, 50), Percentile(times_us, 99)};
}

absl::StatusOr<double> FrameClient::MeasureDispatch(uint32_t payload_bytes, absl::Duration time) {
  ++run_;
  partials_ = 0;
  uint32_t sent = 0;
  LimitedSender sender(transport_);
  const absl::Time begin = absl::Now(), deadline = begin + time + kTimeout;
  while (absl::Now() - begin < time) {
    MK_RETURN_IF_ERROR(lost_);
    FrameRef frame = MakeDispatch(payload_bytes);
    frame.header().layer = kSwallow;
    if (sender.TrySend(kFrameServerId, frame)) {
      ++sent;
    } else {
      Step(kOutOfCredit);
    }
  }
  FrameRef end = MakeDispatch(0);
  end.header().layer = kSwallowed;
  end.header().pairs = sent;
  MK_RETURN_IF_ERROR(transport_.Send(kFrameServerId, std::move(end)));
  MK_RETURN_IF_ERROR(Until([&] { return partials_ > 0; }, deadline, "Dispatch stream"));
  return static_cast<double>(sent) * payload_bytes / absl::ToDoubleSeconds(absl::Now() - begin);
}

absl::StatusOr<absl::Duration> FrameClient::TimePartials(uint32_t payload_bytes, uint32_t count,
                                                         absl::Duration expected) {
  ++run_;
  partials_ = 0;
  FrameRef request = MakeDispatch(payload_bytes);
  request.header().layer = kSend;
  request.header().pairs = count;
  const absl::Time begin = absl::Now();
  MK_RETURN_IF_ERROR(transport_.Send(kFrameServerId, std::move(request)));
  MK_RETURN_IF_ERROR(
      Until([&] { return partials_ >= count; }, begin + expected + kTimeout, "Partial stream"));
  return absl::Now() - begin;
}

absl::StatusOr<double> FrameClient::MeasurePartial(uint32_t payload_bytes, absl::Duration time) {
  // As many as should fill the time: twice as many until they take a tenth of it, then all.
  for (uint32_t count = 64;;) {
    MK_ASSIGN_OR_RETURN(const absl::Duration took, TimePartials(payload_bytes, count, time));
    if (took >= time * 0.75) return static_cast<double>(count) * payload_bytes / absl::ToDoubleSeconds(took);
    const double factor = took < time / 10 ? 2 : absl::FDivDuration(time, took);
    count = static_cast<uint32_t>(count * std::max(1.1, factor));
  }
}

}  // namespace minke::cli::bench
