#include "services/router/router_service.h"

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/cluster/view.h"
#include "services/router/placement/placement_table.h"

namespace minke::router {

absl::StatusOr<std::unique_ptr<RouterService>> RouterService::Start(
    std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
    RouterServiceOptions options) {
  std::unique_ptr<RouterService> service(new RouterService);
  service->pool_ = std::make_unique<ThreadPool>(options.threads);
  const bool routes = checkpoint->config().n_routed_experts > 0 && options.expert_servers > 0;
  Gate gate(checkpoint->config());
  if (routes) {
    MK_ASSIGN_OR_RETURN(gate, Gate::Load(*checkpoint, options.precision, *service->pool_));
  }
  gate.SetOverrideForTest(std::move(options.gate_override));

  cluster::v1::MemberReport report;
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint->fingerprint()));
  report.set_precision(std::string(ToString(options.precision)));
  report.mutable_member()->set_node_id(transport->self().value);
  report.mutable_member()->set_role(cluster::v1::ROLE_ROUTER);
  report.mutable_member()->set_data_address(transport->address());
  report.mutable_member()->set_detail("connecting to expert servers");
  service->engine_ = std::make_unique<RouterEngine>(std::move(gate), options.precision, std::move(transport),
                                                    *service->pool_);
  const CoordinatorOptions coordinator{
      .units = options.expert_servers > 0 ? AllUnits(checkpoint->config()) : std::vector<UnitId>(),
      .replicas = options.replicas,
      .expert_servers = options.expert_servers};
  const bool etcd = !options.registry.etcd.empty();
  std::vector<grpc::Service*> services;
  if (!etcd) {
    service->membership_ = std::make_unique<MembershipService>(
        MembershipOptions{.coordinator = coordinator}, report,
        [raw = service.get()](const cluster::v1::ClusterView& view) { raw->OnView(view); });
    services.push_back(service->membership_.get());
  }
  MK_ASSIGN_OR_RETURN(service->server_, rpc::GrpcServer::Start(options.listen, services));
  const std::string host =
      options.advertise_host.empty() ? rpc::HostOf(options.listen) : options.advertise_host;
  service->rpc_address_ = StrCat(host, ":", service->server_->port());
  service->engine_thread_ = std::thread([raw = service.get()] {
    SetThreadName("router-engine");
    raw->engine_->Run();
  });
  if (etcd) {
    report.mutable_member()->set_rpc_address(service->rpc_address_);
    service->JoinEtcd(options, coordinator, report);
  }
  service->watch_thread_ = std::thread([raw = service.get(), routes, report]() mutable {
    while (!raw->stop_.load()) {
      const RouterStatus status = raw->engine_->status();
      const bool ready = !routes || status.connected;
      report.mutable_member()->set_ready(ready);
      report.mutable_member()->set_detail(ready ? "" : "connecting to expert servers");
      report.clear_lost();
      for (const NodeId server : status.lost) report.add_lost(server.value);
      if (raw->membership_ != nullptr) {
        raw->membership_->SetSelf(report);
      } else {
        raw->registry_->SetReport(report);
      }
      raw->server_->SetServing(ready);
      absl::SleepFor(absl::Milliseconds(20));
    }
  });
  log::Info("router", StrCat("serving rpc=", service->rpc_address_));
  return service;
}

void RouterService::JoinEtcd(const RouterServiceOptions& options, CoordinatorOptions coordinator,
                             const cluster::v1::MemberReport& report) {
  const registry::EtcdOptions etcd{.endpoints = registry::SplitEndpoints(options.registry.etcd),
                                   .cluster = options.registry.cluster};
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
  engine_->UpdateCluster(cluster::DataAddresses(view, cluster::v1::ROLE_EXPERT),
                         std::make_shared<PlacementTable>(cluster::EpochOf(view), cluster::Replicas(view)));
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
