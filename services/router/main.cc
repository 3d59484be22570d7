// minke-router: gates rows and sends them to expert servers; keeps the cluster's registry.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>

#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/node/tls_flags.h"
#include "libs/transport/ucx/ucx.h"
#include "services/router/metrics.h"
#include "services/router/router_service.h"

int main(int argc, char** argv) {
  using namespace minke;
  node::BlockSignals();
  node::NodeFlags flags;
  router::RouterServiceOptions options;
  node::RegistryFlags registry_flags;
  node::TlsFlags tls_flags;
  CLI::App app{"Minke's router: gate, dispatch, and the cluster's registry."};
  node::AddCommonFlags(app, flags);
  node::AddTlsFlags(app, tls_flags);
  node::AddDataPlaneFlags(app, flags);
  node::AddRegistryFlags(app, registry_flags, /*with_router=*/false);
  app.add_option("--experts", options.expert_servers, "expert servers to wait for before the first placement")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--replicas", options.replicas, "servers per (layer, group)")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--spare-slots", options.spare_slots,
                 "units that an expert server which does not say --slots may host beyond its part, as more "
                 "replicas of "
                 "those in demand")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  if (const int code = node::ParseFlags(app, argc, argv, "router", flags); code >= 0) return code;
  const auto fail = [](const absl::Status& status) { return node::Fail("router", status); };

  auto registry = node::ToRegistryAddress(registry_flags, /*with_router=*/false);
  if (!registry.ok()) return fail(registry.status());
  const auto identity = node::OpenTls(tls_flags, *registry);
  if (!identity.ok()) return fail(identity.status());
  if (options.replicas > options.expert_servers) {
    return fail(absl::InvalidArgumentError(StrCat("--replicas: expected at most --experts (",
                                                  options.expert_servers, "), found ", options.replicas)));
  }
  auto device = node::ChooseDevice(flags.device, flags.ParsedPrecision());
  if (!device.ok()) return fail(device.status());
  // auto: a GPU only if rows come to its memory. From the host, the few rows of a message are not worth the
  // way.
  const bool automatic = flags.device == "auto";
  if (automatic && !transport::UcxKnowsCuda()) device = Device::kCpu;
  auto checkpoint = Checkpoint::Open(flags.checkpoint);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  auto data_plane = node::MakeDataPlane(flags, cluster::v1::ROLE_ROUTER, **checkpoint, *device);
  if (!data_plane.ok()) return fail(data_plane.status());
  if (automatic && data_plane->transport->row_memory() == nullptr) device = Device::kCpu;
  options.device = *device;
  options.device_optional = automatic;
  options.registry = *std::move(registry);
  options.on_refused = [](const absl::Status& status) {
    node::Fail("router", status);
    ::_exit(1);  // refused for good: nothing here is worth an orderly end
  };
  options.listen = flags.listen;
  options.identity = *identity;
  options.advertise_host = flags.advertise;
  options.precision = flags.ParsedPrecision();
  options.threads = flags.Threads();
  auto service =
      router::RouterService::Start(*std::move(checkpoint), std::move(data_plane->transport), options);
  if (!service.ok()) return fail(service.status());
  auto metrics = node::ServeMetrics(
      flags, "router", (*service)->engine().transport(),
      [&](telemetry::Page& page) { router::CollectMetrics(**service, /*routes=*/true, page); }, *identity);
  if (!metrics.ok()) return fail(metrics.status());
  node::ReportAddress(flags, (*service)->rpc_address(), (*metrics)->address());
  if (node::WaitForSignal() == SIGTERM) {
    log::Info("router", "draining");
    (*service)->Drain(absl::Seconds(flags.drain_timeout_s), node::SignalPending);
  }
  log::Info("router", "stopping");
  metrics->reset();
  service->reset();
  return 0;
}
