#include "services/experts/expert_service.h"

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/cluster/view.h"

namespace minke::experts {

absl::StatusOr<std::unique_ptr<ExpertService>> ExpertService::Start(
    std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
    ExpertServiceOptions options) {
  std::unique_ptr<ExpertService> service(new ExpertService);
  service->checkpoint_ = std::move(checkpoint);
  service->options_ = std::move(options);
  const ExpertServiceOptions& o = service->options_;
  service->pool_ = std::make_unique<ThreadPool>(o.threads);
  service->load_pool_ = std::make_unique<ThreadPool>(o.threads);
  service->self_.set_node_id(transport->self().value);
  service->self_.set_role(cluster::v1::ROLE_EXPERT);
  service->self_.set_data_address(transport->address());
  MK_ASSIGN_OR_RETURN(service->backend_,
                      MakeBackend(*service->checkpoint_,
                                  {.device = o.device, .format = o.experts_format, .precision = o.precision},
                                  *service->pool_, *service->load_pool_));
  service->engine_ = std::make_unique<ExpertEngine>(service->checkpoint_->config(), o.precision,
                                                    std::move(transport), *service->backend_, o.engine);
  MK_ASSIGN_OR_RETURN(service->server_, rpc::GrpcServer::Start(o.listen, {}));
  service->server_->SetServing(false);
  const std::string host = o.advertise_host.empty() ? rpc::HostOf(o.listen) : o.advertise_host;
  service->self_.set_rpc_address(StrCat(host, ":", service->server_->port()));
  service->engine_thread_ = std::thread([raw = service.get()] {
    SetThreadName("expert-engine");
    raw->engine_->Run();
  });
  cluster::v1::MemberReport report;
  {
    const MutexLock lock(service->mutex_);
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
  report.mutable_member()->set_ready(!assigned_.empty() && to_load_.empty() && not_loaded_ == 0);
  if (not_loaded_ > 0) {
    report.mutable_member()->set_detail(StrCat(not_loaded_, " units could not be loaded"));
  } else if (!to_load_.empty()) {
    report.mutable_member()->set_detail(
        StrCat("loading units: ", assigned_.size() - to_load_.size(), " of ", assigned_.size()));
  }
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint_->fingerprint()));
  report.set_precision(std::string(ToString(options_.precision)));
  for (const UnitId unit : hosted_) {
    cluster::v1::Unit* out = report.add_hosted();
    out->set_layer(unit.layer);
    out->set_group(unit.group);
  }
  return report;
}

void ExpertService::OnUpdate(const cluster::v1::ClusterUpdate& update) {
  engine_->SetEpoch(cluster::EpochOf(update.view()));
  const MutexLock lock(mutex_);
  for (const cluster::v1::Unit& unit : update.assigned()) {
    if (assigned_.insert({unit.layer(), unit.group()}).second)
      to_load_.push_back({unit.layer(), unit.group()});
  }
}

void ExpertService::LoadLoop() {
  absl::Time last_report = absl::InfinitePast();
  while (true) {
    UnitId unit;
    {
      const MutexLock lock(mutex_);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stop_ || !to_load_.empty(); };
      mutex_.Await(due);
      if (stop_) return;
      unit = to_load_.front();
    }
    auto weights = backend_->LoadUnit(unit);
    if (absl::IsInternal(weights.status())) DeviceLost(weights.status());
    // No room on the device, or a checked file that changed under us. It stays assigned: every update of the
    // cluster names it again, and trying again would fail again.
    if (!weights.ok()) {
      log::Error("experts", StrCat("cannot load layer=", unit.layer, " group=", unit.group, ": ",
                                   weights.status().message()));
    }
    const int64_t bytes = weights.ok() ? (*weights)->bytes() : 0;
    if (weights.ok()) engine_->AddUnit(unit, *std::move(weights));
    cluster::v1::MemberReport report;
    bool all = false;
    {
      const MutexLock lock(mutex_);
      to_load_.pop_front();
      if (weights.ok()) {
        hosted_.insert(unit);
        hosted_bytes_ += bytes;
      } else {
        ++not_loaded_;
      }
      all = to_load_.empty();
      report = ReportLocked();
      if (all) {
        log::Info("experts", StrCat("hosting units=", hosted_.size(), " packed_bytes=", hosted_bytes_));
      }
    }
    // Reports are gathered: a large model has hundreds of units.
    if (all || absl::Now() - last_report > absl::Milliseconds(200)) {
      client_->SetReport(report);
      last_report = absl::Now();
    }
    if (all) server_->SetServing(report.member().ready());
  }
}

ExpertService::~ExpertService() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  if (load_thread_.joinable()) load_thread_.join();
  client_.reset();
  if (server_ != nullptr) server_->Shutdown(absl::Seconds(1));
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
  }
}

}  // namespace minke::experts
