// minke-expert: hosts (layer, group) shards of the routed experts and computes the rows it is sent.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <iostream>

#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/node/tls_flags.h"
#include "services/experts/expert_service.h"
#include "services/experts/metrics.h"

int main(int argc, char** argv) {
  using namespace minke;
  node::BlockSignals();
  node::NodeFlags flags;
  experts::ExpertServiceOptions options;
  node::RegistryFlags registry_flags;
  node::TlsFlags tls_flags;
  std::string experts_format = "bf16";
  CLI::App app{"Minke's expert server: grouped SwiGLU over the shards it is given."};
  node::AddCommonFlags(app, flags);
  node::AddTlsFlags(app, tls_flags);
  node::AddDataPlaneFlags(app, flags);
  app.add_option("--experts-format", experts_format, "routed experts in a GPU's memory")
      ->check(CLI::IsMember({"bf16", "fp8"}))
      ->capture_default_str();
  node::AddRegistryFlags(app, registry_flags);
  app.add_option("--slots", options.slots,
                 "(layer, group) units that fit its memory; 0: as many as it is given")
      ->capture_default_str();
  std::string load_from = "auto";
  app.add_option("--load-from", load_from,
                 "units from the checkpoint, or from a server that has them; auto: what proves faster")
      ->check(CLI::IsMember({"auto", "checkpoint", "replica"}))
      ->capture_default_str();
  if (const int code = node::ParseFlags(app, argc, argv, "expert", flags); code >= 0) return code;
  const auto fail = [](const absl::Status& status) { return node::Fail("expert", status); };

  auto registry = node::ToRegistryAddress(registry_flags);
  if (!registry.ok()) return fail(registry.status());
  const auto identity = node::OpenTls(tls_flags, *registry);
  if (!identity.ok()) return fail(identity.status());
  const auto device = node::ChooseDevice(flags.device, flags.ParsedPrecision());
  if (!device.ok()) return fail(device.status());
  options.device = *device;
  options.experts_format =
      experts_format == "fp8" ? experts::ExpertsFormat::kFP8 : experts::ExpertsFormat::kBF16;
  options.load_from = load_from == "checkpoint" ? experts::LoadFrom::kCheckpoint
                      : load_from == "replica"  ? experts::LoadFrom::kReplica
                                                : experts::LoadFrom::kAuto;
  options.precision = flags.ParsedPrecision();
  const absl::Status possible = experts::CheckBackendOptions(
      {.device = options.device, .format = options.experts_format, .precision = options.precision});
  if (!possible.ok()) return fail(possible);
  auto checkpoint = Checkpoint::Open(flags.checkpoint);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  auto data_plane = node::MakeDataPlane(flags, cluster::v1::ROLE_EXPERT, **checkpoint, options.device);
  if (!data_plane.ok()) return fail(data_plane.status());
  options.registry = *std::move(registry);
  options.listen = flags.listen;
  options.identity = *identity;
  options.advertise_host = flags.advertise;
  options.threads = flags.Threads();
  options.on_refused = [](const absl::Status& status) {
    node::Fail("expert", status);
    ::_exit(1);  // refused for good: nothing here is worth an orderly end
  };
  auto service =
      experts::ExpertService::Start(*std::move(checkpoint), std::move(data_plane->transport), options);
  if (!service.ok()) return fail(service.status());
  auto metrics = node::ServeMetrics(
      flags, "expert", (*service)->engine().transport(),
      [&](telemetry::Page& page) { experts::CollectMetrics(**service, page); }, *identity);
  if (!metrics.ok()) return fail(metrics.status());
  node::ReportAddress(flags, "", (*metrics)->address());
  if (node::WaitForSignal() == SIGTERM) {
    log::Info("experts", "draining");
    const absl::Status drained = (*service)->Drain(absl::Seconds(flags.drain_timeout_s), node::SignalPending);
    if (!drained.ok()) log::Warning("experts", StrCat("left before it was drained: ", drained.message()));
  }
  log::Info("experts", "stopping");
  metrics->reset();
  service->reset();
  return 0;
}
