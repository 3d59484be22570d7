// minke-gateway: the OpenAI-compatible HTTP API, and the same over gRPC.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <memory>

#include "absl/strings/str_format.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/node/tls_flags.h"
#include "services/gateway/gateway.h"
#include "services/gateway/request_flags.h"
#include "services/gateway/self_reporter.h"

int main(int argc, char** argv) {
  using namespace minke;
  node::BlockSignals();
  node::NodeFlags flags;
  gateway::GatewayOptions options;
  node::RegistryFlags registry_flags;
  node::TlsFlags tls_flags;
  tls::Files http_tls = node::HttpTlsFiles();
  std::string model_name, chat_template = "auto";
  CLI::App app{"Minke's gateway: OpenAI-compatible API in front of the attention nodes."};
  node::AddCommonFlags(app, flags);
  node::AddTlsFlags(app, tls_flags);
  node::AddHttpTlsFlags(app, http_tls);
  node::AddRegistryFlags(app, registry_flags);
  app.add_option("--http-listen", options.http.listen, "HOST:PORT of the HTTP API, port 0: a free one")
      ->capture_default_str();
  app.add_option("--http-threads", options.http.io_threads)->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--body-max-bytes", options.http.body_bytes_max, "largest request body")
      ->check(CLI::Range(int64_t{1024}, int64_t{1} << 32))
      ->capture_default_str();
  app.add_option("--requests-max", options.sequences_max, "sequences held at once; above: 429")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  int unavailable_after_s = 60;
  app.add_option("--unavailable-after-s", unavailable_after_s,
                 "how long a request waits for attention nodes, or for a cluster that was ready and is not")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  app.add_option("--model-name", model_name, "name in the API (default: the checkpoint folder's)");
  app.add_option("--chat-template", chat_template)
      ->check(CLI::IsMember({"auto", "v2-chat", "v2-chat-0628", "v2.5"}))
      ->capture_default_str();
  app.add_option("--api-key-file", options.api_key_file, "keys that may call the API, one per line");
  app.add_flag(
      "--metrics-vllm-names", options.vllm_names,
      "/metrics also shows the cluster as one vLLM server would, for autoscalers that look for its names");
  app.add_option("--operator-socket", options.operator_socket,
                 "socket of this host's minke up, for the console's scale and drain");
  app.add_option("--operator-token-file", options.operator_token_file,
                 "tokens that may scale and drain, one per line");
  node::TraceFlags trace_flags;
  node::AddTraceFlags(app, trace_flags);
  double slow_request_s = 60;
  gateway::AddRequestFlags(app, options.trace_ratio, slow_request_s);
  int heartbeat_ms = 250;
  app.add_option("--heartbeat-ms", heartbeat_ms,
                 "an attention node silent for two of these loses its sequences to others")
      ->check(CLI::Range(10, 60000))
      ->capture_default_str();
  if (const int code = node::ParseFlags(app, argc, argv, "gateway", flags); code >= 0) return code;
  const auto fail = [](const absl::Status& status) { return node::Fail("gateway", status); };

  auto registry = node::ToRegistryAddress(registry_flags);
  if (!registry.ok()) return fail(registry.status());
  const auto cluster_identity = node::OpenTls(tls_flags, *registry);
  if (!cluster_identity.ok()) return fail(cluster_identity.status());
  const auto public_identity = node::OpenHttpTls(http_tls);
  if (!public_identity.ok()) return fail(public_identity.status());
  auto checkpoint = Checkpoint::Open(flags.checkpoint);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  auto model = gateway::LoadGatewayModel(flags.checkpoint, model_name, chat_template);
  if (!model.ok()) return fail(model.status());
  options.grpc_listen = flags.listen;
  options.cluster_identity = *cluster_identity;
  options.public_identity = *public_identity;
  options.node_id = RandomNodeId();
  options.traces.endpoint = trace_flags.otlp_endpoint;
  options.slow_request = std::chrono::milliseconds(static_cast<int64_t>(1e3 * slow_request_s));
  options.registry = registry_flags.registry;
  options.attention.heartbeat = std::chrono::milliseconds(heartbeat_ms);
  options.unready_wait = options.attention.node_wait_max = std::chrono::seconds(unavailable_after_s);
  auto gateway = gateway::Gateway::Create(options, *std::move(model));
  if (!gateway.ok()) return fail(gateway.status());
  cluster::v1::MemberReport report;
  report.mutable_member()->set_node_id((*gateway)->node_id().value);
  report.mutable_member()->set_pid(static_cast<uint32_t>(::getpid()));
  report.mutable_member()->set_rpc_address((*gateway)->rpc_address());
  report.mutable_member()->set_role(cluster::v1::ROLE_GATEWAY);
  report.mutable_member()->set_ready(true);
  report.set_model_fingerprint(absl::StrFormat("%016x", (*checkpoint)->fingerprint()));
  report.set_precision(flags.precision);
  auto client = registry::Join(
      *registry, report, [&](const cluster::v1::ClusterUpdate& update) { (*gateway)->OnUpdate(update); },
      [](const absl::Status& status) {
        node::Fail("gateway", status);
        ::_exit(1);  // refused for good: nothing here is worth an orderly end
      });
  auto self = std::make_unique<gateway::SelfReporter>(**gateway, *client, report);
  // An address to connect to: what listens everywhere is reached by loopback too.
  const std::string host = options.http.listen.substr(0, options.http.listen.rfind(':'));
  node::ReportAddress(flags, StrCat((*gateway)->port()),
                      StrCat(host == "0.0.0.0" ? "127.0.0.1" : host, ":", (*gateway)->port()));
  if (node::WaitForSignal() == SIGTERM) {
    log::Info("gateway", "draining");
    self->SetDraining();
    if (!(*gateway)->Drain(std::chrono::seconds(flags.drain_timeout_s), node::SignalPending))
      log::Warning("gateway",
                   StrCat("left before it was drained: open sequences=", (*gateway)->active_sequences()));
  }
  log::Info("gateway", "stopping");
  (*gateway)->Shutdown(std::chrono::seconds(2));
  self.reset();
  client.reset();
  return 0;
}
