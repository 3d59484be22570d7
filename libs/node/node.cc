#include "libs/node/node.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <fstream>
#include <iostream>
#include <sstream>

#include "libs/base/cpus.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/cluster/row_shape.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/node/transport_metrics.h"
#include "libs/telemetry/process_metrics.h"
#include "libs/transport/ucx/ucx.h"
#if MK_HAVE_CUDA
#include "libs/kernels/cuda/device.h"
#endif

namespace minke::node {
namespace {

sigset_t StopSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}

absl::StatusOr<std::unique_ptr<transport::Transport>> MakeUcxTransport(const NodeFlags& flags, uint8_t role,
                                                                       const Checkpoint& checkpoint,
                                                                       transport::RowMemory* rows) {
  transport::Identity identity{.node_id = RandomNodeId(),
                               .role = role,
                               .precision = flags.ParsedPrecision(),
                               .model_fingerprint = checkpoint.fingerprint()};
  MK_ASSIGN_OR_RETURN(identity.cluster_secret, ReadSecret(flags.cluster_secret_file));
  transport::UcxOptions options{
      .interface = flags.ucx_interface, .port = flags.ucx_port, .advertise_host = flags.advertise};
  MK_ASSIGN_OR_RETURN(options.selection, transport::ParseUcxSelection(flags.transport));
  options.transport.heartbeat = absl::Milliseconds(flags.heartbeat_ms);
  options.transport.poll = flags.poll == "spin"    ? transport::PollMode::kSpin
                           : flags.poll == "block" ? transport::PollMode::kBlock
                                                   : transport::PollMode::kAdaptive;
  options.transport.rows = rows;
  options.transport.on_deaf = [] {
    // As after a kill: others take over, and whoever supervises this process starts a new one, with a queue
    // of its own.
    log::Error("transport", "nobody can reach this process any more; it ends");
    ::_exit(1);
  };
  return transport::CreateUcx(std::move(identity), std::move(options));
}

}  // namespace

int NodeFlags::Threads() const { return threads > 0 ? threads : UsableCpus(); }

void AddCommonFlags(CLI::App& app, NodeFlags& flags) {
  app.add_option("--checkpoint", flags.checkpoint, "checkpoint folder")->required();
  app.add_option("--precision", flags.precision, "numbers the whole cluster computes in")
      ->check(CLI::IsMember({"exact", "bf16"}))
      ->capture_default_str();
  app.add_option("--listen", flags.listen, "HOST:PORT of the gRPC server, port 0: a free one")
      ->capture_default_str();
  app.add_option("--advertise", flags.advertise,
                 "host by which other processes reach this one (default: as --listen)");
  app.add_option("--drain-timeout-s", flags.drain_timeout_s,
                 "after SIGTERM: how long its work may take to finish or to move elsewhere")
      ->check(CLI::Range(0, 86400))
      ->capture_default_str();
  app.add_option("--log-level", flags.log_level)
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
  app.add_option("--log-format", flags.log_format, "lines of text, or a JSON object each")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  app.add_option("--report-fd", flags.report_fd, "descriptor to write the gRPC address to")->group("");
}

void AddTraceFlags(CLI::App& app, TraceFlags& flags) {
  app.add_option("--otlp-endpoint", flags.otlp_endpoint,
                 "http://HOST:PORT of an OpenTelemetry collector (OTLP over HTTP) for traces of requests");
}

void SetLogs(const std::string& level, const std::string& format) {
  log::SetFormat(format == "json" ? log::Format::kJson : log::Format::kText);
  log::SetLevel(level == "debug"     ? log::Level::kDebug
                : level == "warning" ? log::Level::kWarning
                : level == "error"   ? log::Level::kError
                                     : log::Level::kInfo);
}

void AddRegistryFlags(CLI::App& app, RegistryFlags& flags, bool with_router) {
  app.add_option("--registry", flags.registry, "where membership lives: in one router, or in etcd")
      ->check(CLI::IsMember({"static", "etcd"}))
      ->capture_default_str();
  if (with_router) {
    app.add_option("--router", flags.router, "--registry=static: HOST:PORT of the router's gRPC server");
  }
  app.add_option("--etcd", flags.etcd, "--registry=etcd: HOST:PORT[,HOST:PORT...] of its clients' side");
  app.add_option("--cluster", flags.cluster,
                 "--registry=etcd: name of the cluster, if several share one etcd")
      ->capture_default_str();
}

absl::StatusOr<registry::RegistryAddress> ToRegistryAddress(const RegistryFlags& flags, bool with_router) {
  if (flags.registry == "static") {
    if (!flags.etcd.empty()) {
      return absl::InvalidArgumentError(
          "--etcd: expected --registry=etcd beside it, found --registry=static");
    }
    if (with_router && flags.router.empty()) {
      return absl::InvalidArgumentError(
          "--registry=static: expected --router=HOST:PORT (or --registry=etcd with --etcd=HOST:PORT), found "
          "neither");
    }
    return registry::RegistryAddress{.router = flags.router};
  }
  if (flags.etcd.empty()) {
    return absl::InvalidArgumentError(
        "--registry=etcd: expected --etcd=HOST:PORT[,HOST:PORT...], found none");
  }
  if (!flags.router.empty()) {
    return absl::InvalidArgumentError(
        "--router: expected --registry=static beside it, found --registry=etcd");
  }
  std::istringstream endpoints(flags.etcd);
  for (std::string endpoint; std::getline(endpoints, endpoint, ',');) {
    const size_t colon = endpoint.rfind(':');
    if (endpoint.find("://") != std::string::npos || colon == 0 || colon == std::string::npos ||
        colon + 1 == endpoint.size()) {
      return absl::InvalidArgumentError(
          StrCat("--etcd: expected HOST:PORT[,HOST:PORT...], found '", endpoint, "'"));
    }
  }
  if (flags.cluster.empty() || flags.cluster.find('/') != std::string::npos) {
    return absl::InvalidArgumentError(
        StrCat("--cluster: expected a name without /, found '", flags.cluster, "'"));
  }
  return registry::RegistryAddress{.etcd = flags.etcd, .cluster = flags.cluster};
}

void AddDataPlaneFlags(CLI::App& app, NodeFlags& flags) {
  app.add_option("--device", flags.device)
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  app.add_option(
      "--cpus", flags.cpus,
      "run on these CPUs only, such as 0-7,16; on one NUMA node the weights lie in its memory too");
  app.add_option("--threads", flags.threads, "compute threads; 0: all cores it may run on")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--transport", flags.transport,
                 "data plane; auto: RDMA where UCX finds it, shared memory on loopback, else TCP")
      ->check(CLI::IsMember({"auto", "shm", "tcp", "rdma"}))
      ->capture_default_str();
  app.add_option("--ucx-interface", flags.ucx_interface,
                 "network interface (or its address) of the data plane")
      ->capture_default_str();
  app.add_option("--ucx-port", flags.ucx_port, "port of the data plane; 0: a free one")
      ->capture_default_str();
  app.add_option("--poll", flags.poll, "how the engine waits")
      ->check(CLI::IsMember({"adaptive", "spin", "block"}))
      ->capture_default_str();
  app.add_option("--heartbeat-ms", flags.heartbeat_ms, "a peer silent for two of these is lost")
      ->check(CLI::Range(10, 60000))
      ->capture_default_str();
  // 512 MiB are 2,097 messages of V2's rows. An expert server needs 328 of them for itself; a peer that has
  // its 8,192 rows of credit under way holds 328. What finds no room comes to lie in host memory.
  app.add_option("--row-memory-mib", flags.row_memory_mib,
                 "GPU memory for rows of messages, where UCX can carry them; 0: rows cross host memory")
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  app.add_option("--cluster-secret-file", flags.cluster_secret_file,
                 "file with the secret that members of the data plane prove");
  app.add_option("--metrics-listen", flags.metrics_listen, "HOST:PORT of /metrics, port 0: a free one")
      ->capture_default_str();
}

int ParseFlags(CLI::App& app, int argc, char** argv, const std::string& process_name,
               const NodeFlags& flags) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    std::cerr << "minke-" << process_name << ": " << error.what() << std::endl;
    return 2;
  }
  if (!flags.cpus.empty()) {
    if (absl::Status status = RunOnCpus(flags.cpus); !status.ok()) {
      std::cerr << "minke-" << process_name << ": --cpus: " << status.message() << std::endl;
      return 2;
    }
  }
  log::SetProcessName(process_name);
  SetLogs(flags.log_level, flags.log_format);
  return -1;
}

absl::StatusOr<Device> ChooseDevice(const std::string& device, Precision precision) {
  if (device == "cpu" || (device == "auto" && precision == Precision::kExact)) return Device::kCpu;
  if (precision == Precision::kExact) {
    return absl::InvalidArgumentError("--device: expected cpu with --precision=exact, found cuda");
  }
#if MK_HAVE_CUDA
  const absl::StatusOr<int> count = cuda::DeviceCount();
  if (count.ok() && *count > 0) return Device::kCuda;
  const std::string reason = count.ok() ? "there is no GPU here" : std::string(count.status().message());
#else
  const std::string reason = "this build has no CUDA backend";
#endif
  if (device == "auto") return Device::kCpu;
  return absl::FailedPreconditionError(StrCat("--device: expected cpu or auto, found cuda: ", reason));
}

absl::StatusOr<std::string> ReadSecret(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  std::string secret = text.str();
  while (!secret.empty() && (secret.back() == '\n' || secret.back() == '\r')) secret.pop_back();
  if (!file || secret.empty()) {
    return absl::NotFoundError(
        StrCat("--cluster-secret-file ", path, ": expected a readable file with a secret, found none"));
  }
  return secret;
}

absl::StatusOr<DataPlane> MakeDataPlane(const NodeFlags& flags, uint8_t role, const Checkpoint& checkpoint,
                                        Device device) {
  DataPlane plane;
  if (device == Device::kCpu || checkpoint.config().n_routed_experts == 0) {
    MK_ASSIGN_OR_RETURN(plane.transport, MakeUcxTransport(flags, role, checkpoint, nullptr));
    return plane;
  }
  const bool possible = transport::UcxKnowsCuda();
  std::string staged = possible ? "--row-memory-mib is 0" : "UCX has no CUDA here";
  if (possible && flags.row_memory_mib > 0) {
    const wire::RowShape shape = RowShapeOf(checkpoint.config(), flags.ParsedPrecision());
    const int32_t rows_per_block = wire::DispatchRowsMax(shape);  // of no kind does a message have more
    const int64_t blocks = (int64_t{flags.row_memory_mib} << 20) / (rows_per_block * shape.row_bytes());
    auto rows = MakeGpuRowMemory(shape.row_bytes(), rows_per_block, static_cast<int32_t>(blocks));
    staged = rows.ok() ? "UCX does not carry GPU memory" : std::string(rows.status().message());
    if (rows.ok()) plane.rows = *std::move(rows);
  }
  MK_ASSIGN_OR_RETURN(plane.transport, MakeUcxTransport(flags, role, checkpoint, plane.rows.get()));
  if (plane.transport->row_memory() != nullptr) {
    log::Info("node", StrCat("rows=gpu mib=", plane.rows->bytes() >> 20,
                             " messages=", plane.rows->bytes() / plane.rows->block_bytes()));
  } else {
    log::Info("node", StrCat("rows=staged: ", staged));
    plane.rows.reset();
  }
  return plane;
}

void BlockSignals() {
  const sigset_t set = StopSignals();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
}

void UnblockSignals() {
  const sigset_t set = StopSignals();
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

int WaitForSignal() {
  const sigset_t set = StopSignals();
  int signal = 0;
  ::sigwait(&set, &signal);
  return signal;
}

bool SignalPending() {
  const sigset_t set = StopSignals();
  constexpr timespec kNoTime{};
  return ::sigtimedwait(&set, nullptr, &kNoTime) > 0;
}

void ReportAddress(const NodeFlags& flags, const std::string& address, const std::string& metrics) {
  if (flags.report_fd < 0) return;
  const std::string line = StrCat(address, " ", metrics, "\n");
  // A parent that is gone needs no report; we die with it anyway.
  [[maybe_unused]] const ssize_t written = ::write(flags.report_fd, line.data(), line.size());
  ::close(flags.report_fd);
}

int Fail(const std::string& process_name, const absl::Status& status) {
  std::cerr << "minke-" << process_name << ": " << status.message() << std::endl;
  return 1;
}

absl::StatusOr<std::unique_ptr<telemetry::MetricsServer>> ServeMetrics(
    const NodeFlags& flags, std::string_view role, const transport::Transport& transport,
    telemetry::Collector collector, std::shared_ptr<tls::Identity> identity) {
  const std::string scheme = identity == nullptr ? "http" : "https";
  MK_ASSIGN_OR_RETURN(auto server, telemetry::MetricsServer::Start(
                                       flags.metrics_listen,
                                       [role = std::string(role), &transport,
                                        collector = std::move(collector)](telemetry::Page& page) {
                                         telemetry::CollectProcess(role, ToString(transport.self()), page);
                                         CollectTransport(transport, page);
                                         collector(page);
                                       },
                                       std::move(identity)));
  log::Info("metrics", StrCat("serving ", scheme, "://", server->address(), "/metrics"));
  return server;
}

}  // namespace minke::node
