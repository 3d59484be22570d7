// minke-attention: attention, dense layers, shared experts and sampling over a paged latent cache.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>

#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/node/tls_flags.h"
#include "services/attention/attention_flags.h"
#include "services/attention/attention_service.h"
#include "services/attention/metrics.h"

int main(int argc, char** argv) {
  using namespace minke;
  node::BlockSignals();
  node::NodeFlags flags;
  attention::AttentionFlags attention_flags;
  node::RegistryFlags registry_flags;
  node::TlsFlags tls_flags;
  CLI::App app{"Minke's attention node: MLA over a paged latent cache, continuous batching, sampling."};
  node::AddCommonFlags(app, flags);
  node::AddTlsFlags(app, tls_flags);
  node::AddDataPlaneFlags(app, flags);
  attention::AddAttentionFlags(app, attention_flags);
  node::AddRegistryFlags(app, registry_flags);
  node::TraceFlags trace_flags;
  node::AddTraceFlags(app, trace_flags);
  app.add_option(
      "--weights-from", attention_flags.weights_from,
      "on a GPU: HOST:PORT of a running attention node of this model, whose weights are taken from "
      "its GPU");
  if (const int code = node::ParseFlags(app, argc, argv, "attention", flags); code >= 0) return code;
  const auto fail = [](const absl::Status& status) { return node::Fail("attention", status); };

  auto registry = node::ToRegistryAddress(registry_flags);
  if (!registry.ok()) return fail(registry.status());
  const auto identity = node::OpenTls(tls_flags, *registry);
  if (!identity.ok()) return fail(identity.status());
  const absl::StatusOr<Device> device = node::ChooseDevice(flags.device, flags.ParsedPrecision());
  if (!device.ok()) return fail(device.status());
  auto checkpoint = Checkpoint::Open(flags.checkpoint);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  auto data_plane = node::MakeDataPlane(flags, cluster::v1::ROLE_ATTENTION, **checkpoint,
                                        attention_flags.tensor_parallel > 1 ? Device::kCpu : *device);
  if (!data_plane.ok()) return fail(data_plane.status());
  auto options = attention::ToServiceOptions(attention_flags, **checkpoint, flags.ParsedPrecision());
  if (!options.ok()) return fail(options.status());
  options->registry = *std::move(registry);
  options->listen = flags.listen;
  options->traces.endpoint = trace_flags.otlp_endpoint;
  options->identity = *identity;
  options->advertise_host = flags.advertise;
  options->precision = flags.ParsedPrecision();
  options->device = *device;
  options->threads = flags.Threads();
  options->on_refused = [](const absl::Status& status) {
    node::Fail("attention", status);
    ::_exit(1);  // refused for good: nothing here is worth an orderly end
  };
  auto service = attention::AttentionService::Start(*std::move(checkpoint), std::move(data_plane->transport),
                                                    *std::move(options));
  if (!service.ok()) return fail(service.status());
  auto metrics = node::ServeMetrics(
      flags, "attention", (*service)->engine().transport(),
      [&](telemetry::Page& page) { attention::CollectMetrics(**service, page); }, *identity);
  if (!metrics.ok()) return fail(metrics.status());
  node::ReportAddress(flags, (*service)->rpc_address(), (*metrics)->address());
  if (node::WaitForSignal() == SIGTERM) {
    log::Info("attention", "draining");
    const absl::Status drained = (*service)->Drain(absl::Seconds(flags.drain_timeout_s), node::SignalPending);
    if (!drained.ok()) log::Warning("attention", StrCat("left before it was drained: ", drained.message()));
  }
  log::Info("attention", "stopping");
  metrics->reset();
  service->reset();
  return 0;
}
