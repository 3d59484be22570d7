#include "services/router/api/membership_service.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "google/protobuf/util/message_differencer.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/cluster/make_view.h"
#include "services/router/placement/policy.h"
#include "services/router/placement/step_time.h"

namespace minke::router {

using cluster::v1::ClusterUpdate;
using cluster::v1::ClusterView;
using cluster::v1::MemberReport;

// One member's stream. Only the newest update matters, so at most one waits behind the one being written.
class MembershipService::Stream final : public grpc::ServerBidiReactor<MemberReport, ClusterUpdate> {
 public:
  explicit Stream(MembershipService& service) : service_(service) {}
  void Start() { StartRead(&report_); }

  // Sends an update, with the view if `with_view`, once the line is free.
  void Notify(bool with_view, bool with_statuses) {
    const MutexLock lock(mutex_);
    view_pending_ |= with_view;
    statuses_pending_ |= with_statuses;
    pending_ = true;
    WriteNextLocked();
  }
  void Close(const grpc::Status& status) {
    const MutexLock lock(mutex_);
    if (finished_) return;
    finished_ = true;
    Finish(status);
  }
  void SetMember(NodeId member) {
    const MutexLock lock(mutex_);
    member_ = member;
  }

  void OnReadDone(bool ok) override {
    if (!ok) return Close(grpc::Status::OK);
    const grpc::Status status = service_.OnReport(this, report_);
    if (!status.ok()) return Close(status);
    StartRead(&report_);
  }
  void OnWriteDone(bool ok) override {
    const MutexLock lock(mutex_);
    writing_ = false;
    if (ok) WriteNextLocked();
  }
  void OnCancel() override { Close(grpc::Status::CANCELLED); }
  void OnDone() override { service_.OnGone(this); }  // may destroy this

 private:
  void WriteNextLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_ || !pending_) return;
    update_.Clear();
    service_.FillUpdate(member_, view_pending_, statuses_pending_, update_);
    pending_ = view_pending_ = statuses_pending_ = false;
    writing_ = true;
    StartWrite(&update_);
  }

  MembershipService& service_;
  MemberReport report_;
  Mutex mutex_;  // before service_.mutex_
  ClusterUpdate update_ ABSL_GUARDED_BY(mutex_);
  NodeId member_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool pending_ ABSL_GUARDED_BY(mutex_) = false;
  bool view_pending_ ABSL_GUARDED_BY(mutex_) = false;
  bool statuses_pending_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

MembershipService::MembershipService(MembershipOptions options, cluster::v1::MemberReport self,
                                     OnView on_view)
    : options_([&] {
        // Members of an earlier life of this router join again within their leases, with what they have.
        options.coordinator.fresh_term = static_cast<uint32_t>(absl::ToUnixSeconds(absl::Now()));
        options.coordinator.settled_ms = absl::ToUnixMillis(absl::Now() + 2 * options.lease);
        return std::move(options);
      }()),
      self_{self.member().node_id()},
      on_view_(std::move(on_view)) {
  {
    const MutexLock lock(mutex_);
    members_[self_] = std::move(self);
    RebuildLocked();
  }
  timer_ = std::thread([this] { Timer(); });
}

MembershipService::~MembershipService() {
  Shutdown();
  timer_.join();
}

void MembershipService::Shutdown() {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    const MutexLock lock(mutex_);
    stop_ = true;
    for (const auto& [raw, stream] : streams_) streams.push_back(stream);
  }
  for (const auto& stream : streams)
    stream->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the router is stopping"));
  const MutexLock lock(mutex_);
  mutex_.AwaitFor(absl::Seconds(5),
                  [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return streams_.empty(); });
}

grpc::ServerBidiReactor<MemberReport, ClusterUpdate>* MembershipService::Join(grpc::CallbackServerContext*) {
  const auto stream = std::make_shared<Stream>(*this);
  bool refused = false;
  {
    const MutexLock lock(mutex_);
    streams_[stream.get()] = stream;
    refused = stop_;
  }
  if (refused) {
    stream->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the router is stopping"));
  } else {
    stream->Start();
  }
  return stream.get();
}

grpc::Status MembershipService::OnReport(Stream* stream, const MemberReport& report) {
  const auto refuse = [](const std::string& why) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, why);
  };
  const NodeId id{report.member().node_id()};
  if (id == NodeId{}) return refuse("member.node_id: expected a random number, found 0");
  if (report.member().role() == cluster::v1::ROLE_UNSPECIFIED)
    return refuse("member.role: expected one of the roles, found none");
  if (report.member().role() == cluster::v1::ROLE_ROUTER) {
    return refuse("more than one router needs --registry=etcd; expected one router with a static registry");
  }
  stream->SetMember(id);  // not under mutex_, which streams take under their own
  bool changed = false;
  {
    const MutexLock lock(mutex_);
    const MemberReport& self = members_.at(self_);
    if (report.model_fingerprint() != self.model_fingerprint()) {
      return refuse(StrCat("model fingerprint: expected ", self.model_fingerprint(),
                           " (the router's checkpoint), found ", report.model_fingerprint()));
    }
    if (report.precision() != self.precision()) {
      return refuse(
          StrCat("precision: expected ", self.precision(), " (the router's), found ", report.precision()));
    }
    if (id == self_) return refuse("member.node_id: expected another one than the router's");
    const auto [it, fresh] = members_.try_emplace(id);
    const bool more_than_load = fresh || !cluster::OnlyLoadDiffers(it->second, report);
    if (fresh)
      log::Info("membership",
                StrCat("joined role=", Role_Name(report.member().role()), " node=", ToString(id)));
    changed = more_than_load;
    statuses_dirty_ |= it->second.load().SerializeAsString() != report.load().SerializeAsString();
    it->second = report;
    leases_[id] = {stream, absl::Now()};
    if (changed) RebuildLocked();
  }
  stream->Notify(/*with_view=*/changed, /*with_statuses=*/changed);
  return grpc::Status::OK;
}

void MembershipService::OnGone(Stream* stream) {
  std::shared_ptr<Stream> last;  // destroyed after the lock is released
  const MutexLock lock(mutex_);
  const bool changed =
      std::erase_if(leases_, [&](const auto& lease) {
        if (lease.second.stream != stream) return false;
        const auto it = members_.find(lease.first);
        log::Warning("membership", StrCat("left role=", Role_Name(it->second.member().role()),
                                          " node=", ToString(lease.first)));
        members_.erase(it);
        return true;
      }) > 0;
  auto it = streams_.find(stream);
  last = std::move(it->second);
  streams_.erase(it);
  if (changed) RebuildLocked();
}

void MembershipService::RebuildLocked() {
  cluster::v1::PlacementRecord record =
      Decide(options_.coordinator, members_, record_, absl::ToUnixMillis(absl::Now()));
  ClusterView view = cluster::MakeView(members_, record);
  using google::protobuf::util::MessageDifferencer;
  dirty_ |= !MessageDifferencer::Equals(record, record_) || !MessageDifferencer::Equals(view, view_);
  record_ = std::move(record);
  view_ = std::move(view);
}

void MembershipService::SetSelf(MemberReport self) {
  const MutexLock lock(mutex_);
  MemberReport& mine = members_.at(self_);
  if (mine.SerializeAsString() == self.SerializeAsString()) return;
  mine = std::move(self);
  statuses_dirty_ = true;
  RebuildLocked();
}

ClusterView MembershipService::view() const {
  const MutexLock lock(mutex_);
  return view_;
}

void MembershipService::FillUpdate(NodeId member, bool with_view, bool with_statuses,
                                   ClusterUpdate& update) const {
  const MutexLock lock(mutex_);
  update.set_lease_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(options_.lease)));
  if (const auto it = members_.find(member);
      with_statuses && it != members_.end() && it->second.member().role() == cluster::v1::ROLE_GATEWAY) {
    cluster::AddStatuses(members_, self_, update);
  }
  if (!with_view) return;
  *update.mutable_view() = view_;
  for (const cluster::v1::Assignment& assignment : record_.assigned()) {
    if (assignment.node_id() == member.value) *update.mutable_assigned() = assignment.units();
  }
}

// Spreads changes (gathered for a moment, so that a starting cluster does not send a view per loaded unit)
// and ends leases.
void MembershipService::Timer() {
  constexpr absl::Duration kGather = absl::Milliseconds(20);
  constexpr absl::Duration kStatusesPeriod = absl::Milliseconds(900);  // members renew theirs once a second
  absl::Time last_renewal = absl::Now(), last_statuses = absl::InfinitePast();
  while (true) {
    ClusterView view;
    std::vector<std::shared_ptr<Stream>> streams;
    std::vector<Stream*> expired;
    bool publish = false, renew = false, statuses = false;
    {
      const MutexLock lock(mutex_);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stop_ || dirty_; };
      mutex_.AwaitFor(options_.lease / 6, due);
      if (stop_) return;
      RebuildLocked();  // time has passed
      const absl::Time now = absl::Now();
      renew = now - last_renewal > options_.lease / 3;
      if (renew) last_renewal = now;
      publish = dirty_;
      dirty_ = false;
      statuses = publish || (statuses_dirty_ && now - last_statuses >= kStatusesPeriod);
      if (statuses) {
        statuses_dirty_ = false;
        last_statuses = now;
      }
      view = view_;
      for (const auto& [raw, stream] : streams_) streams.push_back(stream);
      for (const auto& [id, lease] : leases_) {
        if (now - lease.renewed > options_.lease) expired.push_back(lease.stream);
      }
    }
    if (publish) on_view_(view);
    for (const auto& stream : streams) {
      if (std::find(expired.begin(), expired.end(), stream.get()) != expired.end()) {
        stream->Close(grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, "lease ran out"));
      } else if (publish || renew || statuses) {
        stream->Notify(publish, statuses);
      }
    }
    absl::SleepFor(kGather);
  }
}

}  // namespace minke::router
