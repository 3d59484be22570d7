#include "services/router/api/membership_service.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "google/protobuf/util/message_differencer.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
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
  void Notify(bool with_view) {
    const MutexLock lock(mutex_);
    view_pending_ |= with_view;
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
    service_.FillUpdate(member_, view_pending_, update_);
    pending_ = view_pending_ = false;
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
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

MembershipService::MembershipService(MembershipOptions options, cluster::v1::Member self, OnView on_view)
    : options_(std::move(options)),
      units_(options_.expert_servers > 0 ? AllUnits(options_.config) : std::vector<UnitId>()),
      on_view_(std::move(on_view)),
      self_(std::move(self)) {
  {
    const MutexLock lock(mutex_);
    epoch_.term = static_cast<uint32_t>(absl::ToUnixSeconds(absl::Now()));
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
  if (report.model_fingerprint() != options_.model_fingerprint) {
    return refuse(StrCat("model fingerprint: expected ", options_.model_fingerprint,
                         " (the router's checkpoint), found ", report.model_fingerprint()));
  }
  if (report.precision() != options_.precision) {
    return refuse(
        StrCat("precision: expected ", options_.precision, " (the router's), found ", report.precision()));
  }
  if (report.member().role() == cluster::v1::ROLE_ROUTER) {
    return refuse(
        "more than one router needs the etcd registry, which this build does not have; expected one router");
  }
  stream->SetMember(id);
  bool changed = false;
  {
    const MutexLock lock(mutex_);
    auto [it, fresh] = members_.try_emplace(id);
    State& state = it->second;
    changed = fresh || state.report.SerializeAsString() != report.SerializeAsString();
    if (fresh)
      log::Info("membership",
                StrCat("joined role=", Role_Name(report.member().role()), " node=", ToString(id)));
    state.report = report;
    state.stream = stream;
    state.renewed = absl::Now();
    if (changed) RebuildLocked();
  }
  stream->Notify(/*with_view=*/changed);
  return grpc::Status::OK;
}

void MembershipService::OnGone(Stream* stream) {
  std::shared_ptr<Stream> last;  // destroyed after the lock is released
  const MutexLock lock(mutex_);
  const bool changed =
      std::erase_if(members_, [&](const auto& member) {
        if (member.second.stream != stream) return false;
        log::Warning("membership", StrCat("left role=", Role_Name(member.second.report.member().role()),
                                          " node=", ToString(member.first)));
        return true;
      }) > 0;
  auto it = streams_.find(stream);
  last = std::move(it->second);
  streams_.erase(it);
  if (changed) RebuildLocked();
}

// Who should host what. Keeps what is hosted already; waits for the expected pool before the first placement.
void MembershipService::PlaceLocked() {
  PlacementSnapshot snapshot;
  snapshot.shape = ShapeOfUnits(options_.config, /*element_bytes=*/2);
  snapshot.replicas = options_.replicas;
  for (const UnitId unit : units_) snapshot.units.push_back({unit});
  bool placed = false;
  for (const auto& [id, state] : members_) {
    if (state.report.member().role() != cluster::v1::ROLE_EXPERT) continue;
    ServerSnapshot& server = snapshot.servers.emplace_back();
    server.id = id;
    auto old = assignment_.find(id);
    if (old != assignment_.end()) {
      for (const UnitId unit : old->second) server.units.push_back({unit});
    } else {  // joined a restarted router with what it had
      for (const auto& unit : state.report.hosted()) server.units.push_back({{unit.layer(), unit.group()}});
    }
    placed |= !server.units.empty();
  }
  if (!placed && std::ssize(snapshot.servers) < options_.expert_servers) {
    assignment_.clear();
    return;
  }
  assignment_ = PlanWithoutLoads(snapshot);
}

std::string MembershipService::NotReadyReasonLocked() const {
  int experts = 0;
  bool attention = false;
  std::string loading;
  for (const auto& [id, state] : members_) {
    const auto& member = state.report.member();
    if (member.role() == cluster::v1::ROLE_EXPERT) ++experts;
    attention |= member.role() == cluster::v1::ROLE_ATTENTION && member.ready();
    if (!member.ready() && !member.detail().empty()) {
      StrAppend(&loading, loading.empty() ? "" : "; ", Role_Name(member.role()), ": ", member.detail());
    }
  }
  if (!units_.empty() && assignment_.empty()) {
    return StrCat("waiting for expert servers: ", experts, " of ", options_.expert_servers, " joined");
  }
  const int64_t missing = std::count_if(view_.placement().begin(), view_.placement().end(),
                                        [](const auto& unit) { return unit.node_ids().empty(); });
  if (missing > 0) {
    return StrCat("loading experts: ", units_.size() - missing, " of ", units_.size(),
                  " (layer, group) units hosted");
  }
  if (!attention) return loading.empty() ? "waiting for an attention node" : loading;
  if (!self_.ready()) return StrCat("router: ", self_.detail());
  return "";
}

void MembershipService::RebuildLocked() {
  PlaceLocked();
  ClusterView view;
  *view.add_members() = self_;
  std::map<UnitId, PlacementTable::Replicas> hosts;
  for (const UnitId unit : units_) hosts[unit];
  for (const auto& [id, state] : members_) {
    *view.add_members() = state.report.member();
    for (const auto& unit : state.report.hosted()) {
      auto it = hosts.find({unit.layer(), unit.group()});
      if (it != hosts.end()) it->second.push_back(id);  // members_ is ordered by id, so replicas ascend
    }
  }
  for (const auto& [unit, replicas] : hosts) {
    cluster::v1::UnitReplicas* out = view.add_placement();
    out->mutable_unit()->set_layer(unit.layer);
    out->mutable_unit()->set_group(unit.group);
    for (const NodeId replica : replicas) out->add_node_ids(replica.value);
  }
  *view.mutable_epoch() = view_.epoch();
  const bool same_placement = std::equal(
      view.placement().begin(), view.placement().end(), view_.placement().begin(), view_.placement().end(),
      [](const auto& a, const auto& b) { return google::protobuf::util::MessageDifferencer::Equals(a, b); });
  if (!same_placement || epoch_.counter == 0) ++epoch_.counter;
  view.mutable_epoch()->set_term(epoch_.term);
  view.mutable_epoch()->set_counter(epoch_.counter);
  view_ = std::move(view);
  view_.set_not_ready_reason(NotReadyReasonLocked());
  const bool ready = view_.not_ready_reason().empty();
  view_.set_ready(ready);
  dirty_ = true;
}

void MembershipService::SetSelf(bool ready, std::string detail) {
  const MutexLock lock(mutex_);
  if (self_.ready() == ready && self_.detail() == detail) return;
  self_.set_ready(ready);
  self_.set_detail(std::move(detail));
  RebuildLocked();
}

ClusterView MembershipService::view() const {
  const MutexLock lock(mutex_);
  return view_;
}

void MembershipService::FillUpdate(NodeId member, bool with_view, ClusterUpdate& update) const {
  const MutexLock lock(mutex_);
  update.set_lease_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(options_.lease)));
  if (!with_view) return;
  *update.mutable_view() = view_;
  auto it = assignment_.find(member);
  if (it == assignment_.end()) return;
  for (const UnitId unit : it->second) {
    cluster::v1::Unit* out = update.add_assigned();
    out->set_layer(unit.layer);
    out->set_group(unit.group);
  }
}

// Spreads changes (gathered for a moment, so that a starting cluster does not send a view per loaded unit)
// and ends leases.
void MembershipService::Timer() {
  constexpr absl::Duration kGather = absl::Milliseconds(20);
  absl::Time last_renewal = absl::Now();
  while (true) {
    ClusterView view;
    std::vector<std::shared_ptr<Stream>> streams;
    std::vector<Stream*> expired;
    bool publish = false, renew = false;
    {
      const MutexLock lock(mutex_);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stop_ || dirty_; };
      mutex_.AwaitFor(options_.lease / 6, due);
      if (stop_) return;
      const absl::Time now = absl::Now();
      renew = now - last_renewal > options_.lease / 3;
      if (renew) last_renewal = now;
      publish = dirty_;
      dirty_ = false;
      view = view_;
      for (const auto& [raw, stream] : streams_) streams.push_back(stream);
      for (const auto& [id, state] : members_) {
        if (now - state.renewed > options_.lease) expired.push_back(state.stream);
      }
    }
    if (publish) on_view_(view);
    for (const auto& stream : streams) {
      if (std::find(expired.begin(), expired.end(), stream.get()) != expired.end()) {
        stream->Close(grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, "lease ran out"));
      } else if (publish || renew) {
        stream->Notify(publish);
      }
    }
    absl::SleepFor(kGather);
  }
}

}  // namespace minke::router
