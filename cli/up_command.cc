#include "cli/up_command.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "cli/http_client.h"
#include "cli/process.h"
#include "libs/base/cpus.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/cluster/view.h"
#include "libs/etcd/server_command.h"
#include "libs/node/node.h"
#include "libs/registry/registry.h"
#include "libs/transport/inproc/inproc.h"
#include "services/attention/attention_flags.h"
#include "services/experts/expert_service.h"
#include "services/gateway/gateway.h"
#include "services/router/router_service.h"

namespace minke::cli {
namespace {

constexpr absl::Duration kListenTimeout = absl::Minutes(30);  // attention listens when its weights are loaded
constexpr absl::Duration kStopGrace = absl::Seconds(7);
constexpr absl::Duration kEtcdStopGrace = absl::Seconds(1);

Precision PrecisionOf(const UpFlags& flags) {
  return flags.precision == "exact" ? Precision::kExact : Precision::kBF16;
}

bool UsesEtcd(const UpFlags& flags) {
  return flags.registry == "etcd" || (flags.registry.empty() && (flags.routers > 1 || !flags.etcd.empty()));
}

bool FP8Experts(const UpFlags& flags) { return flags.experts_format == "fp8"; }

// What --device comes to, if it can have the precision and the experts' format.
absl::StatusOr<Device> DeviceOf(const UpFlags& flags) {
  MK_ASSIGN_OR_RETURN(const Device device, node::ChooseDevice(flags.device, PrecisionOf(flags)));
  MK_RETURN_IF_ERROR(experts::CheckBackendOptions(
      {.device = device,
       .format = FP8Experts(flags) ? experts::ExpertsFormat::kFP8 : experts::ExpertsFormat::kBF16,
       .precision = PrecisionOf(flags)}));
  return device;
}

absl::Status Validate(const UpFlags& flags) {
  if (flags.routers > 1 && flags.registry == "static") {
    return absl::InvalidArgumentError(StrCat("--routers: expected 1 with --registry=static, found ",
                                             flags.routers, ": several routers need --registry=etcd"));
  }
  if (UsesEtcd(flags)) {
    if (flags.etcd.empty()) {
      MK_RETURN_IF_ERROR(etcd::FindServer().status());
    } else {
      MK_RETURN_IF_ERROR(
          node::ToRegistryAddress({.registry = "etcd", .etcd = flags.etcd, .cluster = flags.cluster})
              .status());
    }
  } else if (!flags.etcd.empty()) {
    return absl::InvalidArgumentError("--etcd: expected --registry=etcd beside it, found --registry=static");
  }
  if (flags.replicas > flags.experts) {
    return absl::InvalidArgumentError(
        StrCat("--replicas: expected at most --experts (", flags.experts, "), found ", flags.replicas));
  }
  MK_RETURN_IF_ERROR(DeviceOf(flags).status());
  return Checkpoint::Open(flags.checkpoint).status();
}

// A folder of our own with the data plane's secret in it.
absl::StatusOr<std::string> MakeRunDirectory() {
  std::string directory = (std::filesystem::temp_directory_path() / "minke-up-XXXXXX").string();
  if (::mkdtemp(directory.data()) == nullptr)
    return absl::UnavailableError(StrCat("cannot make ", directory));
  std::random_device random;
  std::ofstream file(directory + "/cluster-secret");
  for (int i = 0; i < 8; ++i) file << absl::StrFormat("%08x", random());
  file << "\n";
  file.close();
  if (!file) return absl::UnavailableError(StrCat("cannot write ", directory, "/cluster-secret"));
  return directory;
}

std::string ReachableHost(const std::string& host) { return host == "0.0.0.0" ? "127.0.0.1" : host; }

// Watches /health until it is 200, printing each new reason; then calls on_ready.
class ReadyWatch {
 public:
  ReadyWatch(Url url, OnReady on_ready)
      : thread_([this, url = std::move(url), on_ready = std::move(on_ready)] {
          const absl::Time begin = absl::Now();
          std::string last;
          while (!stop_.load()) {
            const absl::StatusOr<HttpAnswer> answer = HttpGet(url, "/health", absl::Seconds(2));
            if (answer.ok() && answer->status == 200) {
              const std::string address = StrCat("http://", url.host, ":", url.port);
              log::Info("up",
                        StrCat("ready ", address, " after ",
                               absl::StrFormat("%.1f", absl::ToDoubleSeconds(absl::Now() - begin)), " s"));
              if (on_ready) on_ready(address);
              return;
            }
            if (answer.ok() && answer->body != last) {
              last = answer->body;
              log::Info("up", Reason(last));  // it begins with "not ready"
            }
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

class Cluster {
 public:
  explicit Cluster(const UpFlags& flags) : flags_(flags) {}
  ~Cluster() {
    // etcd last: the others take their leave of it.
    const auto etcd = std::partition(children_.begin(), children_.end(),
                                     [](const Child& child) { return child.name != "etcd"; });
    std::vector<Child> last(etcd, children_.end());
    children_.erase(etcd, children_.end());
    StopAll(children_, kStopGrace);
    StopAll(last, kEtcdStopGrace);
    if (!directory_.empty()) {
      std::error_code ignored;
      std::filesystem::remove_all(directory_, ignored);
    }
  }

  // Starts every process. `stop_fd` becomes readable when the user wants to stop.
  absl::StatusOr<Url> Start(int stop_fd) {
    MK_ASSIGN_OR_RETURN(directory_, MakeRunDirectory());
    const std::vector<std::string> common = {StrCat("--checkpoint=", flags_.checkpoint),
                                             StrCat("--precision=", flags_.precision),
                                             StrCat("--log-level=", flags_.log_level)};
    const std::vector<std::string> data = {
        StrCat("--cluster-secret-file=", directory_, "/cluster-secret"),
        StrCat("--transport=", flags_.transport), StrCat("--poll=", flags_.poll),
        StrCat("--heartbeat-ms=", flags_.heartbeat_ms), StrCat("--device=", flags_.device)};
    const std::vector<std::string> threads = {StrCat("--threads=", flags_.threads)};
    const int attention_threads = flags_.attention_threads > 0 ? flags_.attention_threads : flags_.threads;
    const auto join = [](std::vector<std::vector<std::string>> parts) {
      std::vector<std::string> all;
      for (auto& part : parts) all.insert(all.end(), part.begin(), part.end());
      return all;
    };
    std::vector<std::string> member, router_flags;
    if (UsesEtcd(flags_)) {
      std::string etcd = flags_.etcd;
      if (etcd.empty()) {
        MK_ASSIGN_OR_RETURN(etcd, StartEtcd());
      }
      member = router_flags = {"--registry=etcd", "--etcd=" + etcd, "--cluster=" + flags_.cluster};
    }
    for (int i = 0; i < flags_.routers; ++i) {
      MK_RETURN_IF_ERROR(
          Add(flags_.routers == 1 ? "router" : StrCat("router ", i), "minke-router",
              join({common,
                    data,
                    threads,
                    router_flags,
                    {StrCat("--experts=", flags_.experts), StrCat("--replicas=", flags_.replicas)}})));
      MK_ASSIGN_OR_RETURN(const std::string router, ReadReport(children_.back(), kListenTimeout, stop_fd));
      if (!UsesEtcd(flags_)) member = {"--router=" + router};
    }
    // Servers in turn on the host's NUMA nodes, so that each one's weights lie beside the cores that read
    // them.
    const std::vector<std::string> nodes = flags_.numa == "auto" ? NumaNodes() : std::vector<std::string>();
    size_t next_node = 0;
    const auto placed = [&]() -> std::vector<std::string> {
      if (nodes.size() < 2) return {};
      return {"--cpus=" + nodes[next_node++ % nodes.size()]};
    };
    for (int i = 0; i < flags_.experts; ++i) {
      MK_RETURN_IF_ERROR(Add(
          StrCat("expert ", i), "minke-expert",
          join({common, data, threads, placed(), member, {"--experts-format=" + flags_.experts_format}})));
    }
    for (int i = 0; i < flags_.attention; ++i) {
      // Not `--trace-file=`: an empty value would be taken from the next argument.
      const std::vector<std::string> trace =
          i == 0 && !flags_.trace_file.empty()
              ? std::vector<std::string>{"--trace-file=" + flags_.trace_file,
                                         StrCat("--trace-steps=", flags_.trace_steps)}
              : std::vector<std::string>{};
      MK_RETURN_IF_ERROR(
          Add(StrCat("attention ", i), "minke-attention",
              join({common,
                    data,
                    placed(),
                    member,
                    {StrCat("--threads=", attention_threads), StrCat("--routing=", flags_.routing),
                     StrCat("--microbatches=", flags_.microbatches), StrCat("--mla=", flags_.mla),
                     StrCat("--cache-mib=", flags_.cache_mib), "--prefix-cache=" + flags_.prefix_cache,
                     StrCat("--step-tokens=", flags_.step_tokens), StrCat("--sequences=", flags_.sequences),
                     StrCat("--decode-stretch=", flags_.decode_stretch), StrCat("--waiting=", flags_.waiting),
                     StrCat("--unavailable-after-s=", flags_.unavailable_after_s)},
                    trace})));
    }
    std::vector<std::string> gateway = {StrCat("--http-listen=", flags_.host, ":", flags_.port),
                                        StrCat("--body-max-bytes=", flags_.body_max_bytes),
                                        "--chat-template=" + flags_.chat_template};
    if (!flags_.model_name.empty()) gateway.push_back("--model-name=" + flags_.model_name);
    if (!flags_.api_key_file.empty()) gateway.push_back("--api-key-file=" + flags_.api_key_file);
    MK_RETURN_IF_ERROR(Add("gateway", "minke-gateway", join({common, member, gateway})));
    MK_ASSIGN_OR_RETURN(const std::string port, ReadReport(children_.back(), kListenTimeout, stop_fd));
    return Url{ReachableHost(flags_.host), port};
  }

  // Reaps children that ended. An error when the cluster cannot go on: its gateway is gone, or anybody died
  // before it was ready.
  absl::Status Reap(bool ready) {
    for (Child& child : children_) {
      int status = 0;
      if (child.ended || ::waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
      child.ended = true;
      const std::string how = WIFSIGNALED(status) ? StrCat("signal ", WTERMSIG(status))
                                                  : StrCat("exit code ", WEXITSTATUS(status));
      const std::string what = StrCat(child.name, " (pid ", child.pid, ") ended: ", how);
      if (!ready || child.name == "gateway") return absl::UnavailableError(what);
      log::Error("up", what + "; nothing is restarted");
    }
    return absl::OkStatus();
  }

 private:
  // Its address.
  absl::StatusOr<std::string> StartEtcd() {
    MK_ASSIGN_OR_RETURN(const std::string program, etcd::FindServer());
    MK_ASSIGN_OR_RETURN(const int client_port, etcd::FreePort());
    MK_ASSIGN_OR_RETURN(const int peer_port, etcd::FreePort());
    MK_ASSIGN_OR_RETURN(
        Child child,
        Spawn("etcd", program, etcd::ServerArguments(directory_ + "/etcd", client_port, peer_port),
              /*reports=*/false));
    log::Info("up", StrCat("started etcd pid=", child.pid));
    children_.push_back(std::move(child));
    return StrCat("127.0.0.1:", client_port);
  }
  absl::Status Add(const std::string& name, const std::string& program, std::vector<std::string> arguments) {
    MK_ASSIGN_OR_RETURN(Child child, Spawn(name, ProgramDirectory() + "/" + program, std::move(arguments)));
    log::Info("up", StrCat("started ", name, " pid=", child.pid));
    children_.push_back(std::move(child));
    return absl::OkStatus();
  }

  const UpFlags flags_;
  std::string directory_;
  std::vector<Child> children_;
};

void AddSharedFlags(CLI::App& app, UpFlags& f) {
  app.add_option("CHECKPOINT", f.checkpoint, "checkpoint folder")->required();
  app.add_option("--host", f.host, "address of the HTTP API")->capture_default_str();
  app.add_option("--port", f.port, "port of the HTTP API; 0: a free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--precision", f.precision)->check(CLI::IsMember({"exact", "bf16"}))->capture_default_str();
  app.add_option("--device", f.device)->check(CLI::IsMember({"cpu", "cuda", "auto"}))->capture_default_str();
  app.add_option("--routing", f.routing, "who gates rows")
      ->check(CLI::IsMember({"remote", "local"}))
      ->capture_default_str();
  app.add_option("--microbatches", f.microbatches)
      ->check(CLI::IsMember({"auto", "1", "2", "3", "4", "5", "6", "7", "8"}))
      ->capture_default_str();
  app.add_option("--mla", f.mla)->check(CLI::IsMember({"auto", "absorbed", "naive"}))->capture_default_str();
  app.add_option("--threads", f.threads, "compute threads of each service; 0: all cores")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--model-name", f.model_name, "name in the API (default: the checkpoint folder's)");
  app.add_option("--chat-template", f.chat_template)
      ->check(CLI::IsMember({"auto", "v2-chat", "v2-chat-0628", "v2.5"}))
      ->capture_default_str();
  app.add_option("--api-key-file", f.api_key_file, "keys that may call the API, one per line");
  app.add_option("--body-max-bytes", f.body_max_bytes, "largest request body")
      ->check(CLI::Range(int64_t{1024}, int64_t{1} << 32))
      ->capture_default_str();
  app.add_option("--cache-mib", f.cache_mib, "latent cache of each attention node")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--prefix-cache", f.prefix_cache,
                 "reuse of latent cache pages by requests that begin the same")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  app.add_option("--step-tokens", f.step_tokens, "rows of one step")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--decode-stretch", f.decode_stretch,
                 "while others decode, a lone prompt may make a step take so many times as long; 0: no limit")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  app.add_option("--sequences", f.sequences, "sequences running at once, per attention node")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--experts-format", f.experts_format,
                 "routed experts in GPU memory; fp8: half the bytes, each weight rounded")
      ->check(CLI::IsMember({"bf16", "fp8"}))
      ->capture_default_str();
  app.add_option("--waiting", f.waiting, "requests waiting, per attention node")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--trace-file", f.trace_file,
                 "write where the time of the first steps goes, for ui.perfetto.dev (first attention node)");
  app.add_option("--trace-steps", f.trace_steps, "steps of the trace")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--unavailable-after-s", f.unavailable_after_s,
                 "how long a request waits for unreachable experts")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  app.add_option("--log-level", f.log_level)
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
}

// Blocks until SIGINT, SIGTERM, or `failed` returns an error; SIGCHLD makes it look at once.
class Signals {
 public:
  Signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&set, signal);
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    sigdelset(&set, SIGCHLD);
    stop_fd_ = ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  ~Signals() { ::close(stop_fd_); }
  int stop_fd() const { return stop_fd_; }
  // Whether the user asked to stop within the time.
  bool Wait(absl::Duration time) {
    pollfd fd{stop_fd_, POLLIN, 0};
    return ::poll(&fd, 1, static_cast<int>(absl::ToInt64Milliseconds(time))) > 0;
  }

 private:
  int stop_fd_;
};

}  // namespace

void AddUpFlags(CLI::App& app, UpFlags& f) {
  AddSharedFlags(app, f);
  app.add_option("--experts", f.experts, "expert servers")->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--attention", f.attention, "attention nodes")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--routers", f.routers, "routers")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--replicas", f.replicas, "servers per (layer, group)")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--attention-threads", f.attention_threads,
                 "compute threads of an attention node; 0: as --threads")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option(
         "--numa", f.numa,
         "auto: where the host has several NUMA nodes, servers take turns on them; off: they run anywhere")
      ->check(CLI::IsMember({"auto", "off"}))
      ->capture_default_str();
  app.add_option("--registry", f.registry,
                 "where membership lives: in the router, or in etcd (default: etcd with several routers, "
                 "else static)")
      ->check(CLI::IsMember({"static", "etcd"}));
  app.add_option("--etcd", f.etcd, "HOST:PORT[,HOST:PORT...] of a running etcd (default: one of its own)");
  app.add_option("--cluster", f.cluster, "name of the cluster in that etcd")->capture_default_str();
  app.add_option("--transport", f.transport)
      ->check(CLI::IsMember({"auto", "shm", "tcp", "rdma"}))
      ->capture_default_str();
  app.add_option("--poll", f.poll)
      ->check(CLI::IsMember({"adaptive", "spin", "block"}))
      ->capture_default_str();
  app.add_option("--heartbeat-ms", f.heartbeat_ms)->check(CLI::Range(10, 60000))->capture_default_str();
}

void AddServeFlags(CLI::App& app, UpFlags& flags) { AddSharedFlags(app, flags); }

absl::Status RunUp(const UpFlags& flags, const OnReady& on_ready) {
  log::SetProcessName("up");
  MK_RETURN_IF_ERROR(Validate(flags));
  Signals signals;
  Cluster cluster(flags);
  absl::StatusOr<Url> url = cluster.Start(signals.stop_fd());
  if (absl::IsCancelled(url.status())) return absl::OkStatus();
  MK_RETURN_IF_ERROR(url.status());
  std::atomic<bool> ready{false};
  ReadyWatch watch(*url, [&](const std::string& address) {
    ready.store(true);
    if (on_ready) on_ready(address);
  });
  while (!signals.Wait(absl::Milliseconds(100))) MK_RETURN_IF_ERROR(cluster.Reap(ready.load()));
  log::Info("up", "stopping");
  return absl::OkStatus();
}

absl::Status RunServe(const UpFlags& flags, const OnReady& on_ready) {
  log::SetProcessName("serve");
  const Precision precision = PrecisionOf(flags);
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
  MK_ASSIGN_OR_RETURN(auto gateway, gateway::Gateway::Create(std::move(gateway_options), std::move(model)));
  MK_ASSIGN_OR_RETURN(auto router,
                      router::RouterService::Start(
                          checkpoint, make_transport(cluster::v1::ROLE_ROUTER),
                          {.precision = precision, .expert_servers = whole ? 0 : 1, .threads = threads}));
  const auto refused = [](const absl::Status& status) { log::Error("serve", StdView(status.message())); };
  std::unique_ptr<experts::ExpertService> experts;
  if (!whole) {
    MK_ASSIGN_OR_RETURN(experts,
                        experts::ExpertService::Start(checkpoint, make_transport(cluster::v1::ROLE_EXPERT),
                                                      {.registry = {.router = router->rpc_address()},
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
  attention_options.registry.router = router->rpc_address();
  attention_options.device = device;
  attention_options.whole = whole;
  attention_options.fp8_experts = FP8Experts(flags);
  attention_options.threads = threads;
  attention_options.on_refused = refused;
  MK_ASSIGN_OR_RETURN(auto attention, attention::AttentionService::Start(
                                          checkpoint, make_transport(cluster::v1::ROLE_ATTENTION),
                                          std::move(attention_options)));
  cluster::v1::MemberReport report;
  report.mutable_member()->set_node_id(RandomNodeId().value);
  report.mutable_member()->set_role(cluster::v1::ROLE_GATEWAY);
  report.mutable_member()->set_ready(true);
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint->fingerprint()));
  report.set_precision(std::string(ToString(precision)));
  const auto client = registry::Join(
      {.router = router->rpc_address()}, report,
      [&gateway](const cluster::v1::ClusterUpdate& update) { gateway->UpdateView(update.view()); }, refused);
  {
    ReadyWatch watch(Url{ReachableHost(flags.host), StrCat(gateway->port())}, on_ready);
    while (!signals.Wait(absl::Hours(1))) {
    }
  }
  log::Info("serve", "stopping");
  gateway->Shutdown(std::chrono::seconds(2));
  return absl::OkStatus();
}

}  // namespace minke::cli
