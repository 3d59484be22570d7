#include "services/router/router_service.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/cluster/rate_meter.h"
#include "libs/cluster/row_shape.h"
#include "libs/cluster/view.h"
#include "services/router/gating/cpu_gate.h"
#include "services/router/placement/placement_table.h"

namespace minke::router {
namespace {

// For the news that this router leaves to reach the attention nodes, and for what they sent before.
constexpr absl::Duration kDrainGrace = absl::Seconds(1);

// Turns the engine's counters into loads, as means over some ten seconds, renewed every second.
class LoadMeter {
 public:
  void Update(const RouterEngine& engine, const RouterStatus& status, absl::Time now,
              cluster::v1::MemberReport& report) {
    const double seconds = absl::ToDoubleSeconds(now - last_);
    if (seconds < 1) return;
    const std::vector<uint64_t> rows = engine.counters().UnitRows();
    const std::vector<int32_t> layers = engine.moe_layers();
    const double newest = first_ ? 1 : 1 - std::exp(-seconds / kMemorySeconds);
    if (first_) rows_per_s_.assign(rows.size(), 0);
    if (rows_.size() == rows.size()) {
      for (size_t i = 0; i < rows.size(); ++i)
        rows_per_s_[i] += newest * (static_cast<double>(rows[i] - rows_[i]) / seconds - rows_per_s_[i]);
      const double exchanges = static_cast<double>(status.dispatches - dispatches_) / seconds;
      exchanges_per_s_ += newest * (exchanges / static_cast<double>(layers.size()) - exchanges_per_s_);
      first_ = false;
    }
    rows_ = rows;
    dispatches_ = status.dispatches;
    last_ = now;
    report.set_exchanges_per_s(exchanges_per_s_);
    report.clear_loads();
    const size_t groups = rows.size() / layers.size();
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows_per_s_[i] < kRowsMin) continue;
      cluster::v1::UnitLoad* load = report.add_loads();
      load->mutable_unit()->set_layer(layers[i / groups]);
      load->mutable_unit()->set_group(static_cast<uint32_t>(i % groups));
      load->set_rows_per_s(rows_per_s_[i]);
    }
  }

 private:
  static constexpr double kMemorySeconds = 10;
  static constexpr double kRowsMin = 1e-3;
  absl::Time last_ = absl::InfinitePast();
  bool first_ = true;
  std::vector<uint64_t> rows_;
  uint64_t dispatches_ = 0;
  std::vector<double> rows_per_s_;
  double exchanges_per_s_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RouterService>> RouterService::Start(
    std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
    RouterServiceOptions options) {
  std::unique_ptr<RouterService> service(new RouterService);
  service->pool_ = std::make_unique<ThreadPool>(options.threads);
  const bool routes = checkpoint->config().n_routed_experts > 0 && options.expert_servers > 0;
  std::unique_ptr<Gate> gate = std::make_unique<CpuGate>(checkpoint->config());
  if (routes) {
    const int32_t rows_max = MessageRowsMax(RowShapeOf(checkpoint->config(), options.precision));
    auto loaded = options.device_optional
                      ? LoadGateOrCpus("router", *checkpoint, options.precision, options.device, rows_max,
                                       *service->pool_)
                      : LoadGate(*checkpoint, options.precision, options.device, rows_max, *service->pool_);
    MK_RETURN_IF_ERROR(loaded.status());
    gate = *std::move(loaded);
  }
  gate->SetOverrideForTest(std::move(options.gate_override));

  cluster::v1::MemberReport report;
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint->fingerprint()));
  report.set_precision(std::string(ToString(options.precision)));
  report.mutable_member()->set_node_id(transport->self().value);
  report.mutable_member()->set_role(cluster::v1::ROLE_ROUTER);
  report.mutable_member()->set_data_address(transport->address());
  report.mutable_member()->set_pid(static_cast<uint32_t>(::getpid()));
  report.mutable_member()->set_detail("connecting to expert servers");
  service->engine_ = std::make_unique<RouterEngine>(std::move(gate), options.precision, std::move(transport),
                                                    *service->pool_);
  const CoordinatorOptions coordinator{
      .units = options.expert_servers > 0 ? AllUnits(checkpoint->config()) : std::vector<UnitId>(),
      .shape = ShapeOfUnits(checkpoint->config(), ActivationBytes(options.precision)),
      .replicas = options.replicas,
      .spare_slots = options.spare_slots,
      .expert_servers = options.expert_servers};
  const bool etcd = !options.registry.etcd.empty();
  std::vector<grpc::Service*> services;
  if (!etcd) {
    service->membership_ = std::make_unique<MembershipService>(
        MembershipOptions{.coordinator = coordinator}, report,
        [raw = service.get()](const cluster::v1::ClusterView& view) { raw->OnView(view); });
    services.push_back(service->membership_.get());
  }
  MK_ASSIGN_OR_RETURN(service->server_, rpc::GrpcServer::Start(options.listen, services, options.identity));
  const std::string host =
      options.advertise_host.empty() ? rpc::HostOf(options.listen) : options.advertise_host;
  service->rpc_address_ = StrCat(host, ":", service->server_->port());
  service->engine_thread_ = std::thread([raw = service.get()] {
    SetThreadName("router-engine");
    raw->engine_->Run();
  });
  report.mutable_member()->set_rpc_address(service->rpc_address_);
  if (etcd) {
    service->JoinEtcd(options, coordinator, report);
  }
  service->watch_thread_ = std::thread([raw = service.get(), routes, report]() mutable {
    LoadMeter meter;
    cluster::RateMeter rates;
    while (!raw->stop_.load()) {
      const RouterStatus status = raw->engine_->status();
      const bool ready = !routes || status.connected;
      report.mutable_member()->set_ready(ready);
      report.mutable_member()->set_draining(raw->draining_.load());
      report.mutable_member()->set_detail(ready ? "" : "connecting to expert servers");
      report.clear_lost();
      for (const NodeId server : status.lost) report.add_lost(server.value);
      if (rates.Begin(absl::Now())) report.mutable_load()->set_rows_per_s(rates.PerSecond(status.rows));
      if (routes) meter.Update(*raw->engine_, status, absl::Now(), report);
      raw->engine_->counters().Tick(absl::Now());
      if (raw->membership_ != nullptr) {
        raw->membership_->SetSelf(report);
      } else {
        raw->registry_->SetReport(report);
      }
      raw->server_->SetServing(ready && !raw->draining_.load());
      absl::SleepFor(absl::Milliseconds(50));
    }
  });
  log::Info("router", StrCat("serving rpc=", service->rpc_address_));
  return service;
}

void RouterService::JoinEtcd(const RouterServiceOptions& options, CoordinatorOptions coordinator,
                             const cluster::v1::MemberReport& report) {
  const registry::EtcdOptions etcd{.endpoints = registry::SplitEndpoints(options.registry.etcd),
                                   .cluster = options.registry.cluster,
                                   .identity = options.registry.identity};
  // An etcd that lost its data while all routers were restarted: the others are on their way back.
  coordinator.settled_ms = absl::ToUnixMillis(absl::Now() + etcd.lease);
  registry_ = std::make_unique<registry::EtcdRegistry>(
      etcd, report, [this](const cluster::v1::ClusterUpdate& update) { OnView(update.view()); },
      options.on_refused);
  coordinator_ = std::make_unique<ElectedCoordinator>(
      *registry_, NodeId{report.member().node_id()},
      [coordinator](const cluster::Members& members, const cluster::v1::PlacementRecord& current) mutable {
        const absl::Time now = absl::Now();
        coordinator.fresh_term = static_cast<uint32_t>(absl::ToUnixSeconds(now));
        return Decide(coordinator, members, current, absl::ToUnixMillis(now));
      });
}

void RouterService::OnView(const cluster::v1::ClusterView& view) {
  cluster_counters_.OnView(view);
  engine_->UpdateCluster(cluster::DataAddresses(view, cluster::v1::ROLE_EXPERT),
                         std::make_shared<PlacementTable>(cluster::EpochOf(view), cluster::Replicas(view)));
}

void RouterService::Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up) {
  if (registry_ == nullptr) return;
  draining_.store(true);
  const absl::Time end = absl::Now() + std::min(limit, kDrainGrace);
  while (absl::Now() < end && !give_up()) absl::SleepFor(absl::Milliseconds(20));
}

RouterService::~RouterService() {
  stop_.store(true);
  if (watch_thread_.joinable()) watch_thread_.join();
  coordinator_.reset();
  registry_.reset();
  if (membership_ != nullptr) membership_->Shutdown();
  if (server_ != nullptr) server_->Shutdown(absl::Seconds(1));
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
  }
  membership_.reset();
}

}  // namespace minke::router
