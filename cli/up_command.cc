#include "cli/up_command.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "cli/http_client.h"
#include "cli/local_cluster.h"
#include "cli/operator_socket.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/registry/registry.h"
#include "libs/transport/inproc/inproc.h"
#include "services/attention/attention_flags.h"
#include "services/attention/metrics.h"
#include "services/experts/expert_service.h"
#include "services/experts/metrics.h"
#include "services/gateway/gateway.h"
#include "services/gateway/self_reporter.h"
#include "services/router/metrics.h"
#include "services/router/router_service.h"

namespace minke::cli {
namespace {

std::string ReachableHost(const std::string& host) { return host == "0.0.0.0" ? "127.0.0.1" : host; }

// Watches /health until it is 200, printing each new reason; then calls on_ready.
class ReadyWatch {
 public:
  ReadyWatch(Url url, const UpFlags& flags, OnReady on_ready)
      : thread_([this, url = std::move(url), certificate = flags.http_tls.certificate.path,
                 client = OwnClientFiles(flags), on_ready = std::move(on_ready)] {
          const absl::Time begin = absl::Now();
          std::string last;
          while (!stop_.load()) {
            const auto gateway = ToOwnGateway(url, certificate, client);  // its files may be new ones
            const absl::StatusOr<HttpAnswer> answer =
                gateway.ok() ? HttpGet(*gateway, "/health", absl::Seconds(2)) : gateway.status();
            if (answer.ok() && answer->status == 200) {
              const std::string address = url.Base();
              log::Info("up",
                        StrCat("ready ", address, " after ",
                               absl::StrFormat("%.1f", absl::ToDoubleSeconds(absl::Now() - begin)), " s"));
              if (on_ready) on_ready(address);
              return;
            }
            const std::string reason = answer.ok()
                                           ? Reason(answer->body)  // it begins with "not ready"
                                           : StrCat("/health cannot be asked: ", answer.status().message());
            if (reason != last) log::Info("up", reason);
            last = reason;
            absl::SleepFor(absl::Milliseconds(100));
          }
        }) {}
  ~ReadyWatch() {
    stop_.store(true);
    thread_.join();
  }

 private:
  static std::string Reason(const std::string& body) {
    const size_t at = body.find("\"message\":\"");
    if (at == std::string::npos) return body;
    const size_t begin = at + 11;
    return body.substr(begin, body.find('"', begin) - begin);
  }
  std::atomic<bool> stop_{false};
  std::thread thread_;  // last: it uses the others
};

// SIGINT and SIGTERM as something to wait for; SIGCHLD ends a wait.
class Signals {
 public:
  Signals() {
    sigset_t stop, child;
    sigemptyset(&stop);
    sigemptyset(&child);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigaddset(&child, SIGCHLD);
    ::pthread_sigmask(SIG_BLOCK, &stop, nullptr);
    ::pthread_sigmask(SIG_BLOCK, &child, nullptr);
    stop_fd_ = ::signalfd(-1, &stop, SFD_CLOEXEC | SFD_NONBLOCK);
    child_fd_ = ::signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  ~Signals() {
    ::close(stop_fd_);
    ::close(child_fd_);
  }
  int stop_fd() const { return stop_fd_; }
  // Whether the user asked to stop. Waits for that for some time, or until a child ends or `wake_fd` (-1:
  // none) becomes readable.
  bool Wait(absl::Duration time, int wake_fd = -1) {
    pollfd fds[] = {{stop_fd_, POLLIN, 0}, {child_fd_, POLLIN, 0}, {wake_fd, POLLIN, 0}};
    if (::poll(fds, 3, static_cast<int>(absl::ToInt64Milliseconds(time))) <= 0) return false;
    signalfd_siginfo ended;
    while (::read(child_fd_, &ended, sizeof ended) > 0) {
    }
    return fds[0].revents != 0;
  }

 private:
  int stop_fd_ = -1, child_fd_ = -1;
};

// Null, and a warning, where the cluster cannot be operated: it serves all the same.
std::unique_ptr<OperatorServer> ServeOperator(LocalCluster& cluster, const Url& url) {
  const std::string path = OperatorSocketPath(std::atoi(url.port.c_str()));
  auto server = OperatorServer::Start(path, {.scale =
                                                 [&](const cluster::v1::ScaleRequest& request) {
                                                   return cluster.Scale(request.role(), request.count());
                                                 },
                                             .drain =
                                                 [&](const cluster::v1::DrainRequest& request) {
                                                   return cluster.Drain(request.role(), request.pid());
                                                 },
                                             .status = [&] { return cluster.Status(); }});
  if (!server.ok()) {
    log::Warning("up", StrCat("minke scale will not work: ", server.status().message()));
    return nullptr;
  }
  log::Info("up", StrCat("operator socket ", path));
  if (const absl::Status linked = cluster.LinkOperatorSocket(path); !linked.ok())
    log::Warning("up", StrCat("the console cannot scale or drain: ", linked.message()));
  return *std::move(server);
}

}  // namespace

absl::Status RunUp(const UpFlags& flags, const OnReady& on_ready) {
  log::SetProcessName("up");
  node::SetLogs(flags.log_level, flags.log_format);
  MK_RETURN_IF_ERROR(Validate(flags));
  Signals signals;
  LocalCluster cluster(flags);
  absl::StatusOr<Url> url = cluster.Start(signals.stop_fd());
  if (absl::IsCancelled(url.status())) return absl::OkStatus();
  MK_RETURN_IF_ERROR(url.status());
  const std::unique_ptr<OperatorServer> operator_server = ServeOperator(cluster, *url);
  const ReadyWatch watch(*url, flags, [&](const std::string& address) {
    cluster.MarkReady();
    if (on_ready) on_ready(address);
  });
  const int wake_fd = operator_server == nullptr ? -1 : operator_server->wake_fd();
  while (!signals.Wait(cluster.Patience(), wake_fd)) {
    if (operator_server != nullptr) operator_server->RunPending();
    MK_RETURN_IF_ERROR(cluster.Tend());
  }
  log::Info("up", "stopping");
  return absl::OkStatus();
}

absl::Status RunServe(const UpFlags& flags, const OnReady& on_ready) {
  log::SetProcessName("serve");
  node::SetLogs(flags.log_level, flags.log_format);
  const Precision precision = PrecisionOf(flags);
  MK_RETURN_IF_ERROR(ValidateTls(flags, /*etcd=*/false));
  MK_ASSIGN_OR_RETURN(const Device device, DeviceOf(flags));
  // A GPU computes whole steps: no expert servers beside it, and no messages.
  const bool whole = device == Device::kCuda;
  Signals signals;
  MK_ASSIGN_OR_RETURN(auto opened, Checkpoint::Open(flags.checkpoint));
  const std::shared_ptr<const Checkpoint> checkpoint = std::move(opened);  // shared by the roles
  const int threads = node::NodeFlags{.threads = flags.threads}.Threads();
  transport::InprocHub hub;
  const auto make_transport = [&](uint8_t role) {
    return transport::CreateInproc(hub, {.node_id = RandomNodeId(),
                                         .role = role,
                                         .precision = precision,
                                         .model_fingerprint = checkpoint->fingerprint()});
  };
  // The gateway first: a port in use should not cost a minute of loading.
  MK_ASSIGN_OR_RETURN(gateway::GatewayModel model,
                      gateway::LoadGatewayModel(flags.checkpoint, flags.model_name, flags.chat_template));
  gateway::GatewayOptions gateway_options;
  gateway_options.http.listen = StrCat(flags.host, ":", flags.port);
  gateway_options.http.body_bytes_max = flags.body_max_bytes;
  gateway_options.api_key_file = flags.api_key_file;
  gateway_options.vllm_names = flags.vllm_names;
  gateway_options.traces.endpoint = flags.otlp_endpoint;
  gateway_options.trace_ratio = flags.trace_ratio;
  gateway_options.slow_request = std::chrono::milliseconds(static_cast<int64_t>(1e3 * flags.slow_request_s));
  gateway_options.node_id = RandomNodeId();
  registry::RegistryAddress registry_address;
  MK_ASSIGN_OR_RETURN(const std::shared_ptr<tls::Identity> identity,
                      node::OpenTls(flags.tls, registry_address));
  gateway_options.cluster_identity = identity;
  MK_ASSIGN_OR_RETURN(gateway_options.public_identity, node::OpenHttpTls(flags.http_tls));
  MK_ASSIGN_OR_RETURN(auto gateway, gateway::Gateway::Create(std::move(gateway_options), std::move(model)));
  MK_ASSIGN_OR_RETURN(auto router,
                      router::RouterService::Start(checkpoint, make_transport(cluster::v1::ROLE_ROUTER),
                                                   {.identity = identity,
                                                    .precision = precision,
                                                    .expert_servers = whole ? 0 : 1,
                                                    .threads = threads}));
  registry_address.router = router->rpc_address();
  const auto refused = [](const absl::Status& status) { log::Error("serve", StdView(status.message())); };
  std::unique_ptr<experts::ExpertService> experts;
  if (!whole) {
    MK_ASSIGN_OR_RETURN(experts,
                        experts::ExpertService::Start(checkpoint, make_transport(cluster::v1::ROLE_EXPERT),
                                                      {.registry = registry_address,
                                                       .identity = identity,
                                                       .precision = precision,
                                                       .threads = threads,
                                                       .on_refused = refused}));
  }
  attention::AttentionFlags attention_flags;
  attention_flags.routing = flags.routing;
  attention_flags.microbatches = flags.microbatches;
  attention_flags.mla = flags.mla;
  attention_flags.cache_mib = flags.cache_mib;
  attention_flags.prefix_cache = flags.prefix_cache;
  attention_flags.step_tokens = flags.step_tokens;
  attention_flags.sequences = flags.sequences;
  attention_flags.decode_stretch = flags.decode_stretch;
  attention_flags.waiting = flags.waiting;
  attention_flags.trace_file = flags.trace_file;
  attention_flags.trace_steps = flags.trace_steps;
  attention_flags.unavailable_after_s = flags.unavailable_after_s;
  MK_ASSIGN_OR_RETURN(auto attention_options,
                      attention::ToServiceOptions(attention_flags, *checkpoint, precision));
  attention_options.registry = registry_address;
  attention_options.identity = identity;
  attention_options.traces.endpoint = flags.otlp_endpoint;
  attention_options.device = device;
  attention_options.whole = whole;
  attention_options.fp8_experts = FP8Experts(flags);
  attention_options.threads = threads;
  attention_options.on_refused = refused;
  MK_ASSIGN_OR_RETURN(auto attention, attention::AttentionService::Start(
                                          checkpoint, make_transport(cluster::v1::ROLE_ATTENTION),
                                          std::move(attention_options)));
  gateway->AddMetrics([&](telemetry::Page& page) {
    // Frames go from hand to hand here: there is no data plane to show.
    router::CollectMetrics(*router, /*routes=*/attention->engine().route_counters() == nullptr && !whole,
                           page);
    attention::CollectMetrics(*attention, page);
    if (experts != nullptr) experts::CollectMetrics(*experts, page);
  });
  const absl::Cleanup no_metrics = [&] { gateway->AddMetrics(nullptr); };
  cluster::v1::MemberReport report;
  report.mutable_member()->set_node_id(gateway->node_id().value);
  report.mutable_member()->set_pid(static_cast<uint32_t>(::getpid()));
  report.mutable_member()->set_rpc_address(gateway->rpc_address());
  report.mutable_member()->set_role(cluster::v1::ROLE_GATEWAY);
  report.mutable_member()->set_ready(true);
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint->fingerprint()));
  report.set_precision(std::string(ToString(precision)));
  const auto client = registry::Join(
      registry_address, report,
      [&gateway](const cluster::v1::ClusterUpdate& update) { gateway->OnUpdate(update); }, refused);
  {
    const gateway::SelfReporter self(*gateway, *client, report);
    const Url url{
        .host = ReachableHost(flags.host), .port = StrCat(gateway->port()), .tls = !flags.http_tls.empty()};
    ReadyWatch watch(url, flags, on_ready);
    while (!signals.Wait(absl::Hours(1))) {
    }
  }
  log::Info("serve", "stopping");
  gateway->Shutdown(std::chrono::seconds(2));
  return absl::OkStatus();
}

}  // namespace minke::cli
