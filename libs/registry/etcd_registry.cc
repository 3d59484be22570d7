#include "libs/registry/etcd_registry.h"

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/mutex.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/etcd/client.h"

namespace minke::registry {
namespace {

using cluster::v1::ClusterUpdate;
using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

constexpr absl::Duration kGather = absl::Milliseconds(20);  // a starting cluster changes often
constexpr absl::Duration kPause = absl::Milliseconds(200);  // after a report that could not be written
constexpr absl::Duration kStatusesPeriod = absl::Milliseconds(900);  // members renew theirs once a second
constexpr int kModelTries = 3;  // of agreeing while others change the same key

absl::Status Refusal(std::string_view mine, std::string_view theirs) {
  return absl::InvalidArgumentError(StrCat("model fingerprint and precision: expected ", theirs,
                                           " (of the cluster's members), found ", mine));
}

}  // namespace

std::vector<std::string> SplitEndpoints(const std::string& endpoints) {
  std::vector<std::string> all;
  std::istringstream text(endpoints);
  for (std::string endpoint; std::getline(text, endpoint, ',');) {
    if (!endpoint.empty()) all.push_back(endpoint);
  }
  return all;
}

struct EtcdRegistry::Impl {
  const EtcdOptions options;
  const EtcdKeys keys;
  const NodeId self;
  const bool gateway;       // is told the members' statuses too
  const std::string model;  // what the cluster has to agree about
  const OnUpdate on_update;
  const OnRefused on_refused;
  etcd::Client client;

  mutable Mutex mutex;
  MemberReport report ABSL_GUARDED_BY(mutex);
  uint64_t report_version ABSL_GUARDED_BY(mutex) = 1;
  EtcdState state ABSL_GUARDED_BY(mutex);
  std::set<NodeId> kept ABSL_GUARDED_BY(mutex);  // members that etcd does not have any more
  absl::Time keep_until ABSL_GUARDED_BY(mutex) = absl::InfinitePast();
  bool registered ABSL_GUARDED_BY(mutex) = false;
  bool register_again ABSL_GUARDED_BY(mutex) = false;  // the lease or a key of ours is gone
  bool dirty ABSL_GUARDED_BY(mutex) = false;           // a view may have to be delivered
  bool loads_dirty ABSL_GUARDED_BY(mutex) = false;     // of members, nothing else changed; gateways care
  bool outage ABSL_GUARDED_BY(mutex) = false;
  bool stop ABSL_GUARDED_BY(mutex) = false;
  std::unique_ptr<etcd::Lease> lease ABSL_GUARDED_BY(mutex);  // replaced by the member thread only

  std::thread member_thread, view_thread;
  std::unique_ptr<etcd::Mirror> mirror;

  Impl(EtcdOptions options, MemberReport report, OnUpdate on_update, OnRefused on_refused);

  // Mirror's thread.
  void OnChange(const etcd::Mirror::Change& change);
  void OnLost(const absl::Status& why);
  // Whether more than a member's load changed.
  bool PutLocked(const etcd::KeyValue& kv) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  void GoneLocked(const std::string& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  void MemberGoneLocked(NodeId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  void ChangedLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    ++state.version;
    dirty = true;
  }

  // Member thread.
  void KeepRegistered();
  absl::Status Register(const std::string& bytes);
  absl::StatusOr<int64_t> EnsureLease();
  absl::Status AgreeOnModel(const std::vector<etcd::KeyValue>& found);

  // View thread.
  void Deliver();
  ClusterUpdate UpdateLocked() const ABSL_SHARED_LOCKS_REQUIRED(mutex);
};

EtcdRegistry::Impl::Impl(EtcdOptions options_in, MemberReport report_in, OnUpdate on_update,
                         OnRefused on_refused)
    : options(std::move(options_in)),
      keys(options.cluster),
      self{report_in.member().node_id()},
      gateway(report_in.member().role() == cluster::v1::ROLE_GATEWAY),
      model(StrCat(report_in.model_fingerprint(), " ", report_in.precision())),
      on_update(std::move(on_update)),
      on_refused(std::move(on_refused)),
      // A third of the lease: an outage is noticed before a lease that it keeps from being renewed runs out.
      client(
          {.endpoints = options.endpoints, .call_timeout = options.lease / 3, .identity = options.identity}),
      report(std::move(report_in)) {}

void EtcdRegistry::Impl::MemberGoneLocked(NodeId id) {
  if (!state.members.contains(id)) return;
  if (absl::Now() < keep_until) {
    kept.insert(id);  // most likely on its way back
  } else {
    state.members.erase(id);
  }
}

bool EtcdRegistry::Impl::PutLocked(const etcd::KeyValue& kv) {
  const Learned learned = ApplyPut(keys, kv, state, kept);
  loads_dirty |= learned.loads;
  return learned.more;
}

void EtcdRegistry::Impl::GoneLocked(const std::string& key) {
  if (key.starts_with(keys.members)) {
    const NodeId id = ParseNodeId(std::string_view(key).substr(keys.members.size()));
    if (id == self) register_again = true;
    MemberGoneLocked(id);
  } else if (key == keys.model) {
    register_again = true;
  } else if (key == keys.placement) {
    state.record_revision = 0;  // what it said still holds until another one is written
  } else if (key == keys.leader) {
    state.leader = NodeId{};
    state.leader_revision = state.leader_lease = 0;
  }
}

void EtcdRegistry::Impl::OnChange(const etcd::Mirror::Change& change) {
  bool back = false;
  {
    const MutexLock lock(mutex);
    if (change.snapshot) {
      back = std::exchange(outage, false);
      if (back) keep_until = absl::Now() + options.lease;
      std::set<std::string> there;
      for (const etcd::KeyValue& kv : change.put) there.insert(kv.key);
      std::vector<NodeId> gone;
      for (const auto& [id, member] : state.members) {
        if (!there.contains(keys.Member(id))) gone.push_back(id);
      }
      for (const NodeId id : gone) MemberGoneLocked(id);
      for (const std::string& key : {keys.model, keys.placement, keys.leader}) {
        if (!there.contains(key)) GoneLocked(key);
      }
      if (registered && !there.contains(keys.Member(self))) register_again = true;
      state.synced = true;
    }
    bool changed = change.snapshot || !change.deleted.empty();
    for (const etcd::KeyValue& kv : change.put) changed |= PutLocked(kv);
    for (const std::string& key : change.deleted) GoneLocked(key);
    if (changed) ChangedLocked();
  }
  if (back) log::Info("registry", "etcd is back");
}

void EtcdRegistry::Impl::OnLost(const absl::Status& why) {
  bool first = false;
  {
    const MutexLock lock(mutex);
    first = !std::exchange(outage, true) && !stop;
    state.synced = false;
    ++state.version;
  }
  if (first) {
    log::Warning("registry",
                 StrCat("etcd=", options.endpoints.front(), options.endpoints.size() > 1 ? ",..." : "",
                        " not reachable: ", why.message(), "; the last view stays, trying again"));
  }
}

absl::StatusOr<int64_t> EtcdRegistry::Impl::EnsureLease() {
  std::unique_ptr<etcd::Lease> old;
  {
    const MutexLock lock(mutex);
    if (lease != nullptr && !lease->expired()) return lease->id();
    old = std::move(lease);
  }
  old.reset();  // outside the lock: it joins its thread
  MK_ASSIGN_OR_RETURN(auto fresh, etcd::Lease::Grant(client, options.lease, [this] {
                        const MutexLock lock(mutex);
                        register_again = true;
                        ++state.version;
                      }));
  const MutexLock lock(mutex);
  lease = std::move(fresh);
  return lease->id();
}

// The cluster has another model than this process, or none.
absl::Status EtcdRegistry::Impl::AgreeOnModel(const std::vector<etcd::KeyValue>& found) {
  if (found.empty()) {
    return client.Commit(etcd::Transaction().IfCreated(keys.model, 0).Put(keys.model, model)).status();
  }
  // A cluster without members may become one of another model; what was placed of the old one goes with it.
  MK_ASSIGN_OR_RETURN(const auto replaced, client.Commit(etcd::Transaction()
                                                             .IfModified(keys.model, found[0].mod_revision)
                                                             .IfNoneUnder(keys.members)
                                                             .Put(keys.model, model)
                                                             .Delete(keys.placement)));
  return replaced.succeeded ? absl::OkStatus() : Refusal(model, found[0].value);
}

absl::Status EtcdRegistry::Impl::Register(const std::string& bytes) {
  MK_ASSIGN_OR_RETURN(const int64_t id, EnsureLease());
  absl::Status status;
  for (int i = 0; i < kModelTries; ++i) {
    MK_ASSIGN_OR_RETURN(const auto written, client.Commit(etcd::Transaction()
                                                              .IfValue(keys.model, model)
                                                              .Put(keys.Member(self), bytes, id)
                                                              .OtherwiseGet(keys.model)));
    if (written.succeeded) return absl::OkStatus();
    MK_RETURN_IF_ERROR(AgreeOnModel(written.got));
  }
  return absl::AbortedError("others keep changing the cluster's model");
}

void EtcdRegistry::Impl::KeepRegistered() {
  SetThreadName("registry-member");
  uint64_t written = 0;
  bool complained = false;
  while (true) {
    std::string bytes;
    uint64_t version = 0;
    {
      const MutexLock lock(mutex);
      mutex.Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
        return stop || register_again || report_version != written;
      });
      if (stop) return;
      register_again = false;
      bytes = report.SerializeAsString();
      version = report_version;
    }
    const absl::Status status = Register(bytes);
    {
      const MutexLock lock(mutex);
      if (stop) return;
      if (status.ok()) {
        written = version;
        registered = true;
        ChangedLocked();
      } else {
        register_again = true;
      }
    }
    if (absl::IsInvalidArgument(status)) {
      on_refused(status);
    } else if (status.ok() || absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
               absl::IsNotFound(status)) {  // which the mirror tells, or which is put right by the next try
      complained = complained && !status.ok();
    } else if (!std::exchange(complained, true)) {
      log::Warning("registry", StrCat("cannot register: ", status.ToString(), "; trying again"));
    }
    const MutexLock lock(mutex);
    const absl::Duration pause = status.ok() ? kGather : kPause;
    if (mutex.AwaitFor(pause, [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop; })) return;
  }
}

ClusterUpdate EtcdRegistry::Impl::UpdateLocked() const {
  ClusterUpdate update;
  *update.mutable_view() = cluster::MakeView(state.members, state.record);
  for (const auto& assignment : state.record.assigned()) {
    if (assignment.node_id() == self.value) *update.mutable_assigned() = assignment.units();
  }
  update.set_lease_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(options.lease)));
  return update;
}

void EtcdRegistry::Impl::Deliver() {
  SetThreadName("registry-view");
  std::string last;
  absl::Time last_statuses = absl::InfinitePast();
  while (true) {
    {
      const MutexLock lock(mutex);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop || dirty; };
      absl::Duration patience = absl::Hours(1);
      if (!kept.empty()) patience = std::max(keep_until - absl::Now(), absl::ZeroDuration());
      if (gateway) patience = std::min(patience, kStatusesPeriod);
      const bool in_time = mutex.AwaitFor(patience, due);
      if (!in_time && !kept.empty() && absl::Now() >= keep_until) {
        for (const NodeId id : kept) state.members.erase(id);
        kept.clear();
        ChangedLocked();
      }
      if (stop) return;
    }
    absl::SleepFor(kGather);
    ClusterUpdate update, statuses;
    {
      const MutexLock lock(mutex);
      if (stop) return;
      dirty = false;
      // Nothing before a place in the cluster is sure.
      if (!registered || (state.version == 0)) continue;
      update = UpdateLocked();
      if (gateway && loads_dirty && absl::Now() - last_statuses >= kStatusesPeriod) {
        loads_dirty = false;
        last_statuses = absl::Now();
        cluster::AddStatuses(state.members, state.leader, statuses);
      }
    }
    std::string bytes = update.SerializeAsString();
    if (bytes == last) {
      if (statuses.statuses_size() == 0) continue;
      update.clear_view();
      update.clear_assigned();
    }
    last = std::move(bytes);
    update.MergeFrom(statuses);
    on_update(update);
  }
}

EtcdRegistry::EtcdRegistry(EtcdOptions options, MemberReport report, OnUpdate on_update, OnRefused on_refused)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(report), std::move(on_update),
                                   std::move(on_refused))) {
  Impl* impl = impl_.get();
  impl->mirror = std::make_unique<etcd::Mirror>(
      impl->client, impl->keys.root,
      etcd::Mirror::Events{.changed = [impl](const etcd::Mirror::Change& change) { impl->OnChange(change); },
                           .lost = [impl](const absl::Status& why) { impl->OnLost(why); }});
  impl->member_thread = std::thread([impl] { impl->KeepRegistered(); });
  impl->view_thread = std::thread([impl] { impl->Deliver(); });
}

EtcdRegistry::~EtcdRegistry() {
  std::unique_ptr<etcd::Lease> lease;
  {
    const MutexLock lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->client.CancelCalls();
  impl_->member_thread.join();
  {
    const MutexLock lock(impl_->mutex);
    lease = std::move(impl_->lease);
  }
  lease.reset();  // with it go the keys
  impl_->mirror.reset();
  impl_->view_thread.join();
}

void EtcdRegistry::SetReport(MemberReport report) {
  const MutexLock lock(impl_->mutex);
  if (report.SerializeAsString() == impl_->report.SerializeAsString()) return;
  impl_->report = std::move(report);
  ++impl_->report_version;
}

bool EtcdRegistry::connected() const {
  const MutexLock lock(impl_->mutex);
  return impl_->state.synced && impl_->registered && impl_->lease != nullptr && impl_->lease->alive();
}

EtcdState EtcdRegistry::AwaitState(uint64_t version, absl::Duration timeout) const {
  Mutex& mutex = impl_->mutex;
  const MutexLock lock(mutex);
  mutex.AwaitFor(timeout,
                 [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return impl_->state.version != version; });
  return impl_->state;
}

int64_t EtcdRegistry::lease() const {
  const MutexLock lock(impl_->mutex);
  return impl_->registered && impl_->lease != nullptr && impl_->lease->alive() ? impl_->lease->id() : 0;
}

absl::StatusOr<bool> EtcdRegistry::BecomeLeader() {
  const int64_t id = lease();
  if (id == 0) return absl::UnavailableError("no lease");
  const EtcdKeys& keys = impl_->keys;
  MK_ASSIGN_OR_RETURN(
      const auto done,
      impl_->client.Commit(
          etcd::Transaction().IfCreated(keys.leader, 0).Put(keys.leader, ToString(impl_->self), id)));
  return done.succeeded;
}

absl::StatusOr<int64_t> EtcdRegistry::WriteRecord(const PlacementRecord& record, int64_t leader_revision,
                                                  int64_t record_revision) {
  const EtcdKeys& keys = impl_->keys;
  MK_ASSIGN_OR_RETURN(const auto done,
                      impl_->client.Commit(etcd::Transaction()
                                               .IfCreated(keys.leader, leader_revision)
                                               .IfModified(keys.placement, record_revision)
                                               .Put(keys.placement, record.SerializeAsString())));
  if (!done.succeeded) return absl::AbortedError("another leader, or another record");
  return done.revision;
}

}  // namespace minke::registry
