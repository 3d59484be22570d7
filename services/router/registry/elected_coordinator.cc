#include "services/router/registry/elected_coordinator.h"

#include <atomic>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"

namespace minke::router {

using cluster::v1::PlacementRecord;

namespace {
constexpr absl::Duration kGather = absl::Milliseconds(20);  // members that change together are one decision
}

struct ElectedCoordinator::Impl {
  registry::EtcdRegistry& registry;
  const NodeId self;
  const DecideFunction decide;
  const absl::Duration period;
  std::atomic<bool> leading{false}, stop{false};
  cluster::Members last_members;  // for the log
  // What was written last, until the registry tells it back.
  PlacementRecord written;
  int64_t written_revision = 0;
  bool complained = false;
  std::thread thread;

  void Run();
  bool Leads(const registry::EtcdState& state);
  void Coordinate(const registry::EtcdState& state);
  void LogMembers(const cluster::Members& members);
};

// Tries to lead where nobody does.
bool ElectedCoordinator::Impl::Leads(const registry::EtcdState& state) {
  const int64_t lease = registry.lease();
  if (!state.synced || lease == 0) return false;
  // Under an earlier lease of ours it is not ours any more: it goes with that lease.
  if (state.leader_revision > 0) return state.leader == self && state.leader_lease == lease;
  const absl::StatusOr<bool> won = registry.BecomeLeader();
  // The registry will tell under which revision; until then nothing could be written.
  if (won.ok() && *won)
    log::Info("registry", StrCat("this router decides the placement node=", ToString(self)));
  return false;
}

void ElectedCoordinator::Impl::LogMembers(const cluster::Members& members) {
  for (const auto& [id, report] : members) {
    if (last_members.contains(id)) continue;
    log::Info("registry",
              StrCat("joined role=", cluster::v1::Role_Name(report.member().role()), " node=", ToString(id)));
  }
  for (const auto& [id, report] : last_members) {
    if (members.contains(id)) continue;
    log::Warning("registry", StrCat("left role=", cluster::v1::Role_Name(report.member().role()),
                                    " node=", ToString(id)));
  }
  last_members = members;
}

void ElectedCoordinator::Impl::Coordinate(const registry::EtcdState& state) {
  LogMembers(state.members);
  const bool told = state.record_revision >= written_revision;
  const PlacementRecord& current = told ? state.record : written;
  const int64_t revision = told ? state.record_revision : written_revision;
  PlacementRecord next = decide(state.members, current);
  if (revision > 0 && next.SerializeAsString() == current.SerializeAsString()) return;
  const absl::StatusOr<int64_t> done = registry.WriteRecord(next, state.leader_revision, revision);
  if (done.ok()) {
    complained = false;
    written = std::move(next);
    written_revision = *done;
  } else {
    written_revision = 0;  // believe what the registry tells
    // Lost races and outages are part of life, and told elsewhere.
    if (!absl::IsAborted(done.status()) && !absl::IsUnavailable(done.status()) &&
        !absl::IsDeadlineExceeded(done.status()) && !std::exchange(complained, true)) {
      log::Warning("registry", StrCat("placement not written: ", done.status().ToString(), "; trying again"));
    }
  }
}

void ElectedCoordinator::Impl::Run() {
  SetThreadName("coordinator");
  registry::EtcdState state;
  while (!stop.load()) {
    state = registry.AwaitState(state.version, period);
    if (stop.load()) return;
    const bool leads = Leads(state);
    if (leading.exchange(leads) && !leads) {
      log::Warning("registry", StrCat("this router decides no more node=", ToString(self)));
      written_revision = 0;
      last_members.clear();
    }
    if (leads) Coordinate(state);
    absl::SleepFor(kGather);
  }
}

ElectedCoordinator::ElectedCoordinator(registry::EtcdRegistry& registry, NodeId self, DecideFunction decide,
                                       absl::Duration period)
    : impl_(new Impl{.registry = registry, .self = self, .decide = std::move(decide), .period = period}) {
  impl_->thread = std::thread([raw = impl_.get()] { raw->Run(); });
}

ElectedCoordinator::~ElectedCoordinator() {
  impl_->stop.store(true);
  impl_->thread.join();
}

bool ElectedCoordinator::leading() const { return impl_->leading.load(); }

}  // namespace minke::router
