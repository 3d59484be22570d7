#include "libs/transport/inproc/inproc.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "libs/base/mutex.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/transport/driver.h"
#include "libs/transport/peer_transport.h"

namespace minke::transport {
namespace internal {

class InprocMailbox;

namespace {

constexpr std::string_view kScheme = "inproc:";

struct Parcel {
  enum class Kind { kOpen, kFrame, kClosed } kind = Kind::kFrame;
  uint64_t link_id = 0;  // the same at both ends
  FrameRef frame;
  uint32_t credits = 0;
  std::shared_ptr<InprocMailbox> sender;  // kOpen
};

}  // namespace

// What others sent to one node. Thread-safe. Shared by the node and by the links that send to it, so that a
// link can find out that its other end is gone.
class InprocMailbox {
 public:
  explicit InprocMailbox(size_t parcels_max) : parcels_max_(parcels_max) {}

  absl::Status Push(Parcel parcel) {
    bool wake;
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return absl::UnavailableError("the other node is gone");
      if (parcel.kind == Parcel::Kind::kFrame && parcels_.size() >= parcels_max_) {
        return absl::ResourceExhaustedError(
            StrCat("the other node's inbox_frames_max=", parcels_max_, " reached"));
      }
      parcels_.push_back(std::move(parcel));
      wake = std::exchange(sleeping_, false);
    }
    if (wake) arrival_.notify_one();
    return absl::OkStatus();
  }

  // Swaps in what has come. `taken` must be empty; its memory is used for what comes next.
  void Take(std::vector<Parcel>& taken) {
    const std::lock_guard lock(mutex_);
    std::swap(parcels_, taken);
  }

  bool empty() {
    const std::lock_guard lock(mutex_);
    return parcels_.empty();
  }

  void Sleep(int64_t timeout_ns) {
    std::unique_lock lock(mutex_);
    sleeping_ = true;
    // A year at most: now + timeout must not overflow.
    const auto limit =
        std::chrono::nanoseconds(std::min<int64_t>(timeout_ns, int64_t{365} * 86400 * 1'000'000'000));
    arrival_.wait_for(lock, limit, [&] { return !parcels_.empty() || signalled_; });
    sleeping_ = false;
    signalled_ = false;
  }

  void Signal() {
    {
      const std::lock_guard lock(mutex_);
      signalled_ = true;
    }
    arrival_.notify_one();
  }

  // Nothing comes any more.
  void Close() {
    std::vector<Parcel> dropped;
    const std::lock_guard lock(mutex_);
    closed_ = true;
    std::swap(parcels_, dropped);
  }

 private:
  const size_t parcels_max_;
  std::mutex mutex_;
  std::condition_variable arrival_;
  std::vector<Parcel> parcels_;
  bool sleeping_ = false;
  bool signalled_ = false;
  bool closed_ = false;
};

class InprocDirectory {
 public:
  void Add(NodeId id, std::shared_ptr<InprocMailbox> mailbox) {
    const MutexLock lock(mutex_);
    MK_CHECK(id.value != 0 && mailboxes_.emplace(id, std::move(mailbox)).second);
  }
  void Remove(NodeId id) {
    const MutexLock lock(mutex_);
    mailboxes_.erase(id);
  }
  std::shared_ptr<InprocMailbox> Find(NodeId id) {
    const MutexLock lock(mutex_);
    const auto found = mailboxes_.find(id);
    return found == mailboxes_.end() ? nullptr : found->second;
  }
  uint64_t NewLinkId() {
    const MutexLock lock(mutex_);
    return ++last_link_id_;
  }

 private:
  Mutex mutex_;
  absl::flat_hash_map<NodeId, std::shared_ptr<InprocMailbox>> mailboxes_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_link_id_ ABSL_GUARDED_BY(mutex_) = 0;
};

namespace {

class InprocDriver;

class InprocLink final : public Link {
 public:
  InprocLink(InprocDriver* driver, uint64_t id, std::shared_ptr<InprocMailbox> remote)
      : driver_(driver), id_(id), remote_(std::move(remote)) {}

  void Send(FrameRef frame, uint8_t version, uint32_t credits, int64_t now_ns) override;
  uint32_t sends_pending() const override { return 0; }
  int64_t oldest_send_ns() const override { return 0; }
  std::string transport_name() override { return "inproc"; }
  void Close() override;

  uint64_t id() const { return id_; }
  bool closed() const { return closed_; }
  bool lost() const { return lost_; }
  void set_lost() { lost_ = true; }

 private:
  InprocDriver* const driver_;
  const uint64_t id_;
  const std::shared_ptr<InprocMailbox> remote_;
  bool lost_ = false;    // reported, or about to be
  bool closed_ = false;  // by us
};

class InprocDriver final : public Driver {
 public:
  InprocDriver(std::shared_ptr<InprocDirectory> directory, NodeId self, FramePool* pool, RowMemory* rows,
               size_t parcels_max)
      : directory_(std::move(directory)),
        self_(self),
        pool_(pool),
        rows_(rows),
        mailbox_(std::make_shared<InprocMailbox>(parcels_max)) {
    directory_->Add(self_, mailbox_);
  }

  ~InprocDriver() override {
    directory_->Remove(self_);
    mailbox_->Close();
    for (auto& [id, link] : links_) {
      if (!link->closed()) link->Close();
    }
  }

  std::string address() const override { return StrCat(kScheme, ToString(self_)); }
  bool carries_rows() const override { return rows_ != nullptr; }
  uint32_t rows_offset_max() const override { return wire::kPayloadBytesMax; }

  absl::StatusOr<std::string> Resolve(std::string_view address) const override {
    uint64_t id = 0;
    if (!address.starts_with(kScheme) || !ParseId(address.substr(kScheme.size()), id)) {
      return absl::InvalidArgumentError(
          StrCat("address: expected inproc: and 16 hexadecimal digits, found \"", address, "\""));
    }
    return std::string(address.substr(kScheme.size()));
  }

  absl::StatusOr<Link*> Open(const std::string& resolved) override {
    uint64_t id = 0;
    MK_CHECK(ParseId(resolved, id));
    std::shared_ptr<InprocMailbox> remote = directory_->Find(NodeId{id});
    if (remote == nullptr) return absl::UnavailableError(StrCat("no node ", resolved, " in this process"));
    const uint64_t link_id = directory_->NewLinkId();
    MK_RETURN_IF_ERROR(remote->Push({.kind = Parcel::Kind::kOpen, .link_id = link_id, .sender = mailbox_}));
    return AddLink(link_id, std::move(remote));
  }

  void Progress(DriverSink& sink) override {
    mailbox_->Take(taken_);
    for (Parcel& parcel : taken_) {
      if (parcel.kind == Parcel::Kind::kOpen) {
        sink.OnAccept(AddLink(parcel.link_id, std::move(parcel.sender)));
        continue;
      }
      const auto found = links_.find(parcel.link_id);
      if (found == links_.end()) continue;
      InprocLink* const link = found->second.get();
      if (link->closed() || link->lost()) continue;
      if (parcel.kind == Parcel::Kind::kClosed) {
        link->set_lost();
        sink.OnLost(link, absl::UnavailableError("connection closed by the other side"));
        continue;
      }
      const wire::FrameHeader& header = parcel.frame.header();
      absl::Status status = wire::ValidateHeader(header, header.payload_bytes);
      if (status.ok()) status = TakeRows(parcel.frame);
      if (status.ok()) {
        sink.OnFrame(link, std::move(parcel.frame), parcel.credits);
      } else {
        sink.OnBadFrame(link, status);
      }
    }
    taken_.clear();
    while (!failed_.empty()) {
      auto [link, status] = std::move(failed_.back());
      failed_.pop_back();
      if (!link->closed()) sink.OnLost(link, status);
    }
    for (const uint64_t id : std::exchange(closed_, {})) links_.erase(id);
  }

  bool PrepareToBlock() override { return failed_.empty() && mailbox_->empty(); }
  void Block(int64_t timeout_ns) override { mailbox_->Sleep(timeout_ns); }
  void Signal() override { mailbox_->Signal(); }

  void Failed(InprocLink* link, absl::Status status) { failed_.emplace_back(link, std::move(status)); }
  void Closed(uint64_t id) { closed_.push_back(id); }

 private:
  static bool ParseId(std::string_view text, uint64_t& id) {
    if (text.size() != 16 || text.find_first_not_of("0123456789abcdef") != std::string_view::npos)
      return false;
    id = std::strtoull(std::string(text).c_str(), nullptr, 16);
    return true;
  }

  // Sees to it that the rows of a frame are where this node looks for them: as they are if both nodes share
  // one row memory, which a process with one GPU does; else in host memory, or in a block of ours if that is
  // host memory too (tests, where each node has its own).
  absl::Status TakeRows(FrameRef& frame) {
    if (frame.device_rows() == nullptr || frame.row_memory() == rows_) return absl::OkStatus();
    const uint32_t offset = frame.rows_offset(), payload_bytes = frame.header().payload_bytes;
    if (rows_ != nullptr && !rows_->on_gpu() && rows_->Fits(frame.header().rows, payload_bytes - offset)) {
      if (FrameRef own = pool_->AllocateWithRows(payload_bytes, offset, *rows_)) {
        own.header() = frame.header();
        std::memcpy(own.payload(), frame.payload(), offset);
        MK_RETURN_IF_ERROR(
            frame.row_memory()->CopyToHost(own.device_rows(), frame.device_rows(), payload_bytes - offset));
        frame = std::move(own);
        return absl::OkStatus();
      }
    }
    MK_ASSIGN_OR_RETURN(frame, pool_->CopyToHost(frame));
    return absl::OkStatus();
  }

  Link* AddLink(uint64_t id, std::shared_ptr<InprocMailbox> remote) {
    return (links_[id] = std::make_unique<InprocLink>(this, id, std::move(remote))).get();
  }

  const std::shared_ptr<InprocDirectory> directory_;  // with the hub and its other transports
  const NodeId self_;
  FramePool* const pool_;
  RowMemory* const rows_;                         // null: none
  const std::shared_ptr<InprocMailbox> mailbox_;  // with the links of others to this node
  absl::flat_hash_map<uint64_t, std::unique_ptr<InprocLink>> links_;
  std::vector<Parcel> taken_;
  std::vector<std::pair<InprocLink*, absl::Status>> failed_;  // to be reported
  std::vector<uint64_t> closed_;                              // to be destroyed
};

void InprocLink::Send(FrameRef frame, uint8_t /*version*/, uint32_t credits, int64_t /*now_ns*/) {
  if (closed_ || lost_) return;
  // Both ends are this build, so the version of the frame is the agreed one.
  if (absl::Status status = remote_->Push(
          {.kind = Parcel::Kind::kFrame, .link_id = id_, .frame = std::move(frame), .credits = credits});
      !status.ok()) {
    lost_ = true;
    driver_->Failed(this, std::move(status));
  }
}

void InprocLink::Close() {
  if (std::exchange(closed_, true)) return;
  remote_->Push({.kind = Parcel::Kind::kClosed, .link_id = id_})
      .IgnoreError();  // gone already: the same to us
  driver_->Closed(id_);
}

}  // namespace
}  // namespace internal

InprocHub::InprocHub() : directory_(std::make_shared<internal::InprocDirectory>()) {}
InprocHub::~InprocHub() = default;

std::unique_ptr<Transport> CreateInproc(InprocHub& hub, Identity identity, TransportOptions options) {
  auto pool = std::make_unique<FramePool>();
  auto driver = std::make_unique<internal::InprocDriver>(hub.directory_, identity.node_id, pool.get(),
                                                         options.rows, options.inbox_frames_max);
  return std::make_unique<internal::PeerTransport>(std::move(pool), std::move(driver), std::move(identity),
                                                   options);
}

}  // namespace minke::transport
