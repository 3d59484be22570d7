#include "services/experts/expert_service.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/cluster/view.h"

namespace minke::experts {

namespace {

// Rows sent by an older placement still arrive this long after a newer one is published.
constexpr absl::Duration kLateRows = absl::Seconds(1);
constexpr absl::Duration kRetirePeriod = absl::Milliseconds(200);
// Loading goes on beside serving, which comes first.
constexpr int kLoaderNiceness = 10;

// What the placement reckons with for a CPU's thread: the policy compares servers and weighs reading against
// arithmetic, so orders of magnitude do. For GPUs it has its own.
constexpr double kThreadBytesPerSecond = 15e9;
constexpr double kThreadFlopsPerSecond = 200e9;

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertService>> ExpertService::Start(
    std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
    ExpertServiceOptions options) {
  std::unique_ptr<ExpertService> service(new ExpertService);
  service->checkpoint_ = std::move(checkpoint);
  service->options_ = std::move(options);
  const ExpertServiceOptions& o = service->options_;
  service->sources_.emplace(o.load_from);
  service->pool_ = std::make_unique<ThreadPool>(o.threads);
  service->load_pool_ = std::make_unique<ThreadPool>(o.threads, kLoaderNiceness);
  cluster::v1::Member self;
  self.set_node_id(transport->self().value);
  self.set_role(cluster::v1::ROLE_EXPERT);
  self.set_data_address(transport->address());
  self.set_pid(static_cast<uint32_t>(::getpid()));
  MK_ASSIGN_OR_RETURN(service->backend_, MakeBackend(*service->checkpoint_,
                                                     {.device = o.device,
                                                      .format = o.experts_format,
                                                      .precision = o.precision,
                                                      .rows = transport->row_memory()},
                                                     *service->pool_, *service->load_pool_));
  service->engine_ = std::make_unique<ExpertEngine>(service->checkpoint_->config(), o.precision,
                                                    std::move(transport), *service->backend_, o.engine);
  MK_ASSIGN_OR_RETURN(service->server_, rpc::GrpcServer::Start(o.listen, {}, o.identity));
  service->server_->SetServing(false);
  const std::string host = o.advertise_host.empty() ? rpc::HostOf(o.listen) : o.advertise_host;
  self.set_rpc_address(StrCat(host, ":", service->server_->port()));
  self.set_host(host);
  service->engine_thread_ = std::thread([raw = service.get()] {
    SetThreadName("expert-engine");
    raw->engine_->Run();
  });
  cluster::v1::MemberReport report;
  {
    const MutexLock lock(service->mutex_);
    service->self_ = std::move(self);
    report = service->ReportLocked();
  }
  service->client_ = registry::Join(
      o.registry, report,
      [raw = service.get()](const cluster::v1::ClusterUpdate& update) { raw->OnUpdate(update); },
      o.on_refused);
  // After the client, to which it reports.
  service->load_thread_ = std::thread([raw = service.get()] { raw->LoadLoop(); });
  return service;
}

cluster::v1::MemberReport ExpertService::ReportLocked() const {
  cluster::v1::MemberReport report;
  *report.mutable_member() = self_;
  *report.mutable_load() = load_;
  report.mutable_member()->set_ready(!assigned_.empty() && to_load_.empty() && failed_.empty());
  if (!failed_.empty()) {
    report.mutable_member()->set_detail(StrCat(failed_.size(), " units could not be loaded"));
  } else if (!to_load_.empty()) {
    report.mutable_member()->set_detail(
        StrCat("loading units: ", assigned_.size() - to_load_.size(), " of ", assigned_.size()));
  }
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint_->fingerprint()));
  report.set_precision(std::string(ToString(options_.precision)));
  report.set_unit_slots(options_.slots);
  if (options_.device == Device::kCpu) {
    report.set_bytes_per_s(kThreadBytesPerSecond * options_.threads);
    report.set_flops_per_s(kThreadFlopsPerSecond * options_.threads);
  }
  for (const auto& [unit, bytes] : hosted_) {
    if (retiring_.contains(unit)) continue;
    cluster::v1::Unit* out = report.add_hosted();
    out->set_layer(unit.layer);
    out->set_group(unit.group);
  }
  return report;
}

void ExpertService::OnUpdate(const cluster::v1::ClusterUpdate& update) {
  engine_->SetEpoch(cluster::EpochOf(update.view()));
  const MutexLock lock(mutex_);
  replicas_ = cluster::Replicas(update.view());
  addresses_ = cluster::DataAddresses(update.view(), cluster::v1::ROLE_EXPERT);
  const std::map<UnitId, cluster::ReplicaSet>& replicas = replicas_;
  const NodeId self{self_.node_id()};
  const auto published_for = [&](UnitId unit, auto&& who) {
    const auto it = replicas.find(unit);
    return it != replicas.end() && std::any_of(it->second.servers.begin(), it->second.servers.end(), who);
  };
  assigned_.clear();
  for (const cluster::v1::Unit& unit : update.assigned()) assigned_.insert({unit.layer(), unit.group()});
  std::erase_if(to_load_,
                [&](UnitId unit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !assigned_.contains(unit); });
  std::erase_if(failed_,
                [&](UnitId unit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !assigned_.contains(unit); });
  for (const UnitId unit : assigned_) {
    const bool here = hosted_.contains(unit);
    if (here) retiring_.erase(unit);
    if (here || failed_.contains(unit)) continue;
    if (std::find(to_load_.begin(), to_load_.end(), unit) == to_load_.end()) to_load_.push_back(unit);
  }
  for (const auto& [unit, bytes] : hosted_) {
    // A registry that has just started may not know yet what is whose: what nobody else has stays.
    if (assigned_.contains(unit) || retiring_.contains(unit)) continue;
    if (published_for(unit, [&](NodeId server) { return server == self; })) continue;
    if (!published_for(unit, [&](NodeId server) { return server != self; })) continue;
    retiring_[unit] = absl::Now() + kLateRows;
  }
  published_ = std::count_if(replicas.begin(), replicas.end(), [&](const auto& entry) {
    const std::vector<NodeId>& servers = entry.second.servers;
    return std::find(servers.begin(), servers.end(), self) != servers.end();
  });
  const auto& members = update.view().members();
  successors_ = std::any_of(members.begin(), members.end(), [&](const cluster::v1::Member& member) {
    return member.role() == cluster::v1::ROLE_EXPERT && member.node_id() != self.value && !member.draining();
  });
  report_due_ = true;
}

std::optional<UnitExchange::Giver> ExpertService::GiverOf(UnitId unit) {
  const MutexLock lock(mutex_);
  const auto replicas = replicas_.find(unit);
  if (replicas == replicas_.end()) return std::nullopt;
  std::vector<UnitExchange::Giver> givers;
  for (const NodeId server : replicas->second.servers) {
    const auto address = addresses_.find(server);
    if (server.value != self_.node_id() && address != addresses_.end())
      givers.push_back({server, address->second});
  }
  if (givers.empty()) return std::nullopt;
  return givers[(self_.node_id() + unit.layer + unit.group) % givers.size()];  // several share the work
}

absl::StatusOr<std::shared_ptr<const UnitWeights>> ExpertService::LoadFromReplica(
    UnitId unit, const UnitExchange::Giver& giver) {
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<UnitBuilder> builder, backend_->BuildUnit(unit));
  MK_RETURN_IF_ERROR(engine_->exchange().Fetch(unit, backend_->UnitLayout(unit), giver, *builder));
  return builder->Finish();
}

absl::StatusOr<std::shared_ptr<const UnitWeights>> ExpertService::Load(UnitId unit) {
  const std::optional<UnitExchange::Giver> giver = GiverOf(unit);
  const UnitSource source = sources_->Choose(giver.has_value());
  const auto timed = [&](UnitSource from, auto&& load) {
    const absl::Time begin = absl::Now();
    absl::StatusOr<std::shared_ptr<const UnitWeights>> weights = load();
    if (absl::IsCancelled(weights.status())) return weights;
    const absl::Duration took = absl::Now() - begin;
    sources_->Record(from, weights.ok() ? (*weights)->bytes() : 0, took);
    if (weights.ok()) {
      const MutexLock lock(mutex_);
      ExpertServiceStatus::Loads& loads = loaded_[static_cast<size_t>(from)];
      ++loads.units;
      loads.time += took;
    }
    return weights;
  };
  if (source == UnitSource::kReplica) {
    auto weights = timed(source, [&] { return LoadFromReplica(unit, *giver); });
    // Memory that does not suffice for a copy does not suffice for the original.
    if (weights.ok() || absl::IsInternal(weights.status()) || absl::IsResourceExhausted(weights.status()) ||
        absl::IsCancelled(weights.status()))
      return weights;
    log::Info("experts", StrCat("layer=", unit.layer, " group=", unit.group,
                                " did not come from=", ToString(giver->node),
                                ", loading it from the checkpoint: ", weights.status().message()));
  }
  return timed(UnitSource::kCheckpoint, [&] { return backend_->LoadUnit(unit); });
}

bool ExpertService::LoadNext() {
  UnitId unit;
  {
    const MutexLock lock(mutex_);
    if (to_load_.empty()) return false;
    unit = to_load_.front();
  }
  auto weights = Load(unit);
  if (absl::IsCancelled(weights.status())) return false;
  if (absl::IsInternal(weights.status())) DeviceLost(weights.status());
  // No room on the device, or a checked file that changed under us. It stays assigned: every update of the
  // cluster names it again, and trying again would fail again.
  if (!weights.ok()) {
    log::Error("experts", StrCat("cannot load layer=", unit.layer, " group=", unit.group, ": ",
                                 weights.status().message()));
  }
  const int64_t bytes = weights.ok() ? (*weights)->bytes() : 0;
  if (weights.ok()) engine_->AddUnit(unit, *std::move(weights));
  const MutexLock lock(mutex_);
  std::erase(to_load_, unit);
  if (bytes == 0) {
    failed_.insert(unit);
  } else {
    hosted_[unit] = bytes;
  }
  if (to_load_.empty()) {
    int64_t all = 0;
    for (const auto& [hosted, size] : hosted_) all += size;
    const auto from = [&](UnitSource source) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return absl::StrFormat("%d (%.2f GB/s)", loaded_[static_cast<size_t>(source)].units,
                             sources_->bytes_per_s(source) / 1e9);
    };
    log::Info("experts", StrCat("hosting units=", hosted_.size(), " packed_bytes=", all,
                                " loaded from checkpoint=", from(UnitSource::kCheckpoint),
                                " replicas=", from(UnitSource::kReplica)));
  }
  return true;
}

bool ExpertService::RetireNext() {
  engine_->TakeRemoved();  // frees what was taken out before
  const MutexLock lock(mutex_);
  for (auto it = retiring_.begin(); it != retiring_.end(); ++it) {
    if (it->second > absl::Now()) continue;
    engine_->RemoveUnit(it->first);
    hosted_.erase(it->first);
    retiring_.erase(it);
    if (retiring_.empty()) log::Info("experts", StrCat("let go of units; hosting units=", hosted_.size()));
    return true;
  }
  return false;
}

ExpertServiceStatus ExpertService::status() const {
  const MutexLock lock(mutex_);
  ExpertServiceStatus status{.node = NodeId{self_.node_id()},
                             .hosted = {},
                             .loading = std::ssize(to_load_),
                             .failed = std::ssize(failed_),
                             .retiring = std::ssize(retiring_),
                             .loaded = loaded_};
  for (const auto& [unit, bytes] : hosted_) {
    status.hosted.push_back(unit);
    status.hosted_bytes += bytes;
  }
  return status;
}

void ExpertService::UpdateLoad() {
  if (!meter_.Begin(absl::Now())) return;
  const ExpertEngineStatus status = engine_->status();
  cluster::v1::MemberLoad load;
  load.set_rows_per_s(meter_.PerSecond(status.rows));
  load.set_queued_rows(static_cast<uint32_t>(std::min<int64_t>(status.queued_rows, UINT32_MAX)));
  const ExpertEngineCounters& counters = engine_->counters();
  const ModelConfig& config = checkpoint_->config();
  for (const int32_t layer : config.MoeLayers()) {
    uint64_t rows = 0;
    for (int32_t group = 0; group < config.placement_groups(); ++group) {
      rows += counters.UnitRows({static_cast<uint32_t>(layer), static_cast<uint32_t>(group)})
                  .load(std::memory_order_relaxed);
    }
    load.add_layer_rows_per_s(meter_.PerSecond(rows));
  }
  if (load.rows_per_s() == 0) load.clear_layer_rows_per_s();
  const MutexLock lock(mutex_);
  if (load.SerializeAsString() == load_.SerializeAsString()) return;
  load_ = std::move(load);
  report_due_ = true;
}

void ExpertService::LoadLoop() {
  SetThreadName("expert-loader");
  YieldToOthers(kLoaderNiceness);
  absl::Time last_report = absl::InfinitePast();
  while (true) {
    {
      const MutexLock lock(mutex_);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stop_ || report_due_ || !to_load_.empty();
      };
      mutex_.AwaitFor(kRetirePeriod, due);
      if (stop_) return;
    }
    UpdateLoad();
    const bool loaded = LoadNext();
    if (!loaded) engine_->exchange().Rest();
    const bool retired = RetireNext();
    cluster::v1::MemberReport report;
    bool all = false;
    {
      const MutexLock lock(mutex_);
      if (!loaded && !retired && !report_due_) continue;
      report_due_ = false;
      all = to_load_.empty();
      report = ReportLocked();
    }
    // Reports are gathered: a large model has hundreds of units.
    if (all || absl::Now() - last_report > absl::Milliseconds(200)) {
      client_->SetReport(report);
      last_report = absl::Now();
    }
    if (all) server_->SetServing(report.member().ready());
  }
}

absl::Status ExpertService::Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up) {
  const absl::Time end = absl::Now() + limit;
  {
    const MutexLock lock(mutex_);
    self_.set_draining(true);
    report_due_ = true;
  }
  while (true) {
    absl::SleepFor(absl::Milliseconds(20));
    if (give_up()) return absl::CancelledError("asked to stop at once");
    {
      const MutexLock lock(mutex_);
      if (published_ == 0) break;
      if (!successors_) {
        return absl::FailedPreconditionError(
            StrCat("no other expert server is there to take over ", published_, " units"));
      }
      if (absl::Now() > end) {
        return absl::DeadlineExceededError(StrCat("after ", absl::FormatDuration(limit),
                                                  " others have not taken over ", published_, " units"));
      }
    }
  }
  absl::SleepFor(std::min(kLateRows, end - absl::Now()));
  while (engine_->status().queued_rows > 0 && absl::Now() < end) absl::SleepFor(absl::Milliseconds(20));
  return absl::OkStatus();
}

ExpertService::~ExpertService() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  if (engine_ != nullptr) engine_->exchange().Stop();
  if (load_thread_.joinable()) load_thread_.join();
  client_.reset();
  if (server_ != nullptr) server_->Shutdown(absl::Seconds(1));
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
  }
}

}  // namespace minke::experts
