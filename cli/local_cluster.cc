#include "cli/local_cluster.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "cli/targets_file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/etcd/server_command.h"

namespace minke::cli {
namespace {

using namespace cluster::v1;  // NOLINT: enumerators of Role and ChildState

constexpr absl::Duration kListenTimeout = absl::Minutes(30);  // attention listens when its weights are loaded
constexpr absl::Duration kStopGrace = absl::Seconds(7);
constexpr absl::Duration kEtcdStopGrace = absl::Seconds(1);

struct Program {
  Role role;
  const char* name;  // of its children, and after "minke-" the program's
};
constexpr Program kPrograms[] = {{ROLE_ROUTER, "router"},
                                 {ROLE_EXPERT, "expert"},
                                 {ROLE_ATTENTION, "attention"},
                                 {ROLE_GATEWAY, "gateway"},
                                 {ROLE_UNSPECIFIED, "etcd"}};

const char* NameOf(Role role) {
  return std::find_if(std::begin(kPrograms), std::end(kPrograms),
                      [role](const Program& program) { return program.role == role; })
      ->name;
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

// For a reader in another folder.
std::string Absolute(const std::string& path) {
  return path.empty() ? path : std::filesystem::absolute(path).string();
}

std::string ReachableHost(const std::string& host) { return host == "0.0.0.0" ? "127.0.0.1" : host; }

std::string Seconds(absl::Duration time) { return absl::StrFormat("%.1f s", absl::ToDoubleSeconds(time)); }

std::string Named(const cluster::v1::Child& child) {
  return StrCat(child.name(), " (pid ", child.pid(), ")");
}

std::string HowItEnded(int status) {
  return WIFSIGNALED(status) ? StrCat("signal ", WTERMSIG(status))
                             : StrCat("exit code ", WEXITSTATUS(status));
}

}  // namespace

LocalCluster::LocalCluster(const UpFlags& flags)
    : flags_(flags), numa_nodes_(flags.numa == "auto" ? NumaNodes() : std::vector<std::string>()) {
  addresses_.http = StrCat(flags.host, ":", flags.port);
  addresses_.etcd = flags.etcd;
  addresses_.etcd_tls = flags.tls.etcd;
}

LocalCluster::~LocalCluster() {
  std::vector<minke::cli::Child*> processes, etcd;
  for (Member& member : members_)
    (member.info.role() == ROLE_UNSPECIFIED ? etcd : processes).push_back(&member.process);
  StopAll(processes, kStopGrace);
  StopAll(etcd, kEtcdStopGrace);  // last: the others take their leave of it
  if (!targets_written_.empty()) ::unlink(targets_file_.c_str());
  if (!directory_.empty()) {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
}

absl::StatusOr<Url> LocalCluster::Start(int stop_fd) {
  MK_ASSIGN_OR_RETURN(directory_, MakeRunDirectory());
  addresses_.secret_file = directory_ + "/cluster-secret";
  if (!flags_.operator_token_file.empty()) addresses_.operator_socket = directory_ + "/operator.sock";
  if (UsesEtcd(flags_) && flags_.etcd.empty()) MK_RETURN_IF_ERROR(StartEtcd());
  const auto add_all = [&](Role role, int count) {
    absl::Status status;
    for (int i = 0; i < count && status.ok(); ++i) status = Add(role);
    return status;
  };
  for (int i = 0; i < flags_.routers; ++i) {
    MK_RETURN_IF_ERROR(Add(ROLE_ROUTER));
    MK_ASSIGN_OR_RETURN(const Report report, ReadReport(members_.back().process, kListenTimeout, stop_fd));
    members_.back().info.set_state(CHILD_STATE_RUNNING);
    members_.back().metrics = report.metrics;
    if (!UsesEtcd(flags_)) addresses_.router = report.address;
  }
  MK_RETURN_IF_ERROR(add_all(ROLE_EXPERT, flags_.experts));
  MK_RETURN_IF_ERROR(add_all(ROLE_ATTENTION, flags_.attention));
  MK_RETURN_IF_ERROR(Add(ROLE_GATEWAY));
  MK_ASSIGN_OR_RETURN(const Report report, ReadReport(members_.back().process, kListenTimeout, stop_fd));
  const std::string& port = report.address;
  members_.back().info.set_state(CHILD_STATE_RUNNING);
  members_.back().metrics = report.metrics;
  addresses_.http = StrCat(flags_.host, ":", port);
  http_ = Url{.host = ReachableHost(flags_.host), .port = port, .tls = !flags_.http_tls.empty()};
  targets_file_ = flags_.targets_file.empty() ? DefaultTargetsFile(std::atoi(port.c_str()), ::getuid())
                                              : flags_.targets_file;
  if (const absl::Status written = WriteTargets(); !written.ok()) {
    if (!flags_.targets_file.empty())
      return absl::UnavailableError(StrCat("--targets-file: ", written.message()));
    log::Warning("up", StrCat("Prometheus will not find this cluster: ", written.message()));
  } else {
    log::Info("up", StrCat("targets file ", targets_file_));
  }
  return http_;
}

absl::Status LocalCluster::StartEtcd() {
  MK_ASSIGN_OR_RETURN(etcd_program_, etcd::FindServer());
  MK_ASSIGN_OR_RETURN(const int client_port, etcd::FreePort());
  MK_ASSIGN_OR_RETURN(const int peer_port, etcd::FreePort());
  etcd_arguments_ = etcd::ServerArguments(directory_ + "/etcd", client_port, peer_port, flags_.tls.cluster);
  const tls::Files& own = flags_.tls.cluster;  // etcd is one of the cluster's processes
  if (!own.empty())
    addresses_.etcd_tls = {
        {"--etcd-cert", own.certificate.path}, {"--etcd-key", own.key.path}, {"--etcd-ca", own.ca.path}};
  addresses_.etcd = StrCat("127.0.0.1:", client_port);
  return Add(ROLE_UNSPECIFIED);
}

std::string LocalCluster::NextCpus() {
  // Each one's weights lie beside the cores that read them.
  return numa_nodes_.size() < 2 ? "" : numa_nodes_[next_numa_node_++ % numa_nodes_.size()];
}

absl::Status LocalCluster::Add(Role role) {
  Member member;
  const int number = named_[role]++;
  const bool numbered =
      role == ROLE_EXPERT || role == ROLE_ATTENTION || (role == ROLE_ROUTER && UsesEtcd(flags_));
  member.info.set_role(role);
  member.info.set_name(numbered ? StrCat(NameOf(role), " ", number) : NameOf(role));
  if (role == ROLE_EXPERT || role == ROLE_ATTENTION) member.cpus = NextCpus();
  member.trace = role == ROLE_ATTENTION && number == 0;
  MK_RETURN_IF_ERROR(Launch(member));
  log::Info("up", StrCat("started ", member.info.name(), " pid=", member.info.pid()));
  members_.push_back(std::move(member));
  return absl::OkStatus();
}

std::vector<std::string> LocalCluster::ArgumentsOf(const Member& member) const {
  switch (member.info.role()) {
    case ROLE_ROUTER: {
      // The first routers are there before the expert servers for which they wait.
      const int experts = named_[ROLE_EXPERT] == 0 ? flags_.experts : Staying(ROLE_EXPERT);
      return RouterArguments(flags_, addresses_, std::max(experts, flags_.replicas));
    }
    case ROLE_EXPERT:
      return ExpertArguments(flags_, addresses_, member.cpus);
    case ROLE_ATTENTION:
      return AttentionArguments(flags_, addresses_, member.cpus, member.trace);
    case ROLE_GATEWAY:
      return GatewayArguments(flags_, addresses_);
    default:
      return etcd_arguments_;
  }
}

absl::Status LocalCluster::Launch(Member& member) {
  const bool ours = member.info.role() != ROLE_UNSPECIFIED;
  const std::string program =
      ours ? StrCat(ProgramDirectory(), "/minke-", NameOf(member.info.role())) : etcd_program_;
  MK_ASSIGN_OR_RETURN(member.process,
                      Spawn(member.info.name(), program, ArgumentsOf(member), /*reports=*/ours));
  member.info.set_pid(member.process.pid);
  member.info.set_state(ours ? CHILD_STATE_STARTING : CHILD_STATE_RUNNING);
  member.started_at = absl::Now();
  return absl::OkStatus();
}

int LocalCluster::Staying(Role role) const {
  return static_cast<int>(std::count_if(members_.begin(), members_.end(), [role](const Member& member) {
    return member.info.role() == role && Stays(member.info.state());
  }));
}

absl::Status LocalCluster::Tend() {
  for (Member& member : members_) {
    if (member.info.state() == CHILD_STATE_RESTARTING) {
      if (absl::Now() >= member.restart_at) Restart(member);
      continue;
    }
    if (member.process.ended) continue;
    if (member.process.report_fd >= 0) {
      const auto report = TakeReport(member.process);  // one that ended without is reaped in a moment
      if (report.ok() && report->has_value()) member.metrics = (*report)->metrics;
      if (report.ok() && report->has_value() && member.info.state() == CHILD_STATE_STARTING)
        member.info.set_state(CHILD_STATE_RUNNING);
    }
    int status = 0;
    if (::waitpid(member.process.pid, &status, WNOHANG) != member.process.pid) continue;
    member.process.ended = true;
    if (member.process.report_fd >= 0) ::close(std::exchange(member.process.report_fd, -1));
    MK_RETURN_IF_ERROR(OnEnd(member, status));
  }
  std::erase_if(members_, [](const Member& member) {
    return member.info.state() == CHILD_STATE_DRAINING && member.process.ended;
  });
  if (const absl::Status written = WriteTargets(); !written.ok())
    log::Warning("up", StdView(written.message()));
  return absl::OkStatus();
}

// Those that have died stay in it, so that they are seen to be down; those that were to leave do not.
absl::Status LocalCluster::WriteTargets() {
  std::vector<ScrapeTarget> targets;
  for (const Member& member : members_) {
    if (member.metrics.empty()) continue;
    const bool gateway = member.info.role() == ROLE_GATEWAY;
    targets.push_back({.address = member.metrics,
                       .job = StrCat("minke-", NameOf(member.info.role())),
                       .member = member.info.name(),
                       .tls = !(gateway ? flags_.http_tls : flags_.tls.cluster).empty()});
  }
  std::string json = TargetsJson(flags_.cluster, targets);
  if (targets_file_.empty() || json == targets_written_) return absl::OkStatus();
  targets_written_ = std::move(json);  // tried once: not again until something changes
  return ReplaceFile(targets_file_, targets_written_);
}

absl::Status LocalCluster::OnEnd(Member& member, int status) {
  const std::string what = StrCat(Named(member.info), " ended: ", HowItEnded(status));
  if (member.info.state() == CHILD_STATE_DRAINING) {
    log::Info("up", StrCat(what, "; it had been asked to"));
    return absl::OkStatus();
  }
  const bool fatal = !ready_.load() || (member.info.role() == ROLE_GATEWAY && !flags_.supervise);
  if (fatal) return absl::UnavailableError(what);
  if (flags_.supervise) {
    Schedule(member, absl::Now() - member.started_at, what);
    return absl::OkStatus();
  }
  member.info.set_state(CHILD_STATE_ENDED);
  log::Error("up", what + "; nothing is restarted");
  return absl::OkStatus();
}

void LocalCluster::Schedule(Member& member, absl::Duration life, const std::string& what) {
  const absl::Duration pause = member.pause.Next(life);
  member.info.set_state(CHILD_STATE_RESTARTING);
  member.restart_at = absl::Now() + pause;
  log::Error("up", StrCat(what, "; started again in ", Seconds(pause)));
}

void LocalCluster::Restart(Member& member) {
  member.info.set_restarts(member.info.restarts() + 1);
  if (const absl::Status status = Launch(member); !status.ok()) {
    return Schedule(member, absl::ZeroDuration(),
                    StrCat(member.info.name(), " cannot be started: ", status.message()));
  }
  log::Info("up", StrCat("restarted ", member.info.name(), " pid=", member.info.pid(),
                         " restarts=", member.info.restarts()));
}

absl::Duration LocalCluster::Patience() const {
  const bool soon = std::any_of(members_.begin(), members_.end(), [](const Member& member) {
    return member.info.state() == CHILD_STATE_RESTARTING || member.info.state() == CHILD_STATE_STARTING;
  });
  return absl::Milliseconds(soon ? 10 : 100);
}

absl::StatusOr<ScaleAnswer> LocalCluster::Scale(Role role, int64_t count) {
  const StatusAnswer now = Status();
  const std::vector<cluster::v1::Child> children(now.children().begin(), now.children().end());
  MK_ASSIGN_OR_RETURN(
      const ScalePlan plan,
      PlanScale(children, role, count, {.etcd = UsesEtcd(flags_), .replicas = flags_.replicas}));
  if (!ready_.load())
    return absl::FailedPreconditionError("the cluster is still starting: try again once it is ready");
  ScaleAnswer answer;
  answer.set_before(Staying(role));
  for (int i = 0; i < plan.start; ++i) {
    MK_RETURN_IF_ERROR(Add(role));
    *answer.add_started() = members_.back().info;
  }
  for (const size_t index : plan.drain) {
    AskToLeave(members_[index]);
    *answer.add_draining() = members_[index].info;
  }
  return answer;
}

absl::StatusOr<DrainAnswer> LocalCluster::Drain(Role role, int32_t pid) {
  const StatusAnswer now = Status();
  const std::vector<cluster::v1::Child> children(now.children().begin(), now.children().end());
  MK_ASSIGN_OR_RETURN(const size_t index, PlanDrain(children, role, pid,
                                                    {.etcd = UsesEtcd(flags_), .replicas = flags_.replicas}));
  if (!ready_.load())
    return absl::FailedPreconditionError("the cluster is still starting: try again once it is ready");
  AskToLeave(members_[index]);
  DrainAnswer answer;
  *answer.mutable_draining() = members_[index].info;
  return answer;
}

void LocalCluster::AskToLeave(Member& member) {
  member.info.set_state(CHILD_STATE_DRAINING);
  if (!member.process.ended) ::kill(member.process.pid, SIGTERM);
  log::Info("up", StrCat("draining ", Named(member.info)));
}

absl::Status LocalCluster::LinkOperatorSocket(const std::string& path) const {
  if (addresses_.operator_socket.empty()) return absl::OkStatus();
  std::error_code error;
  std::filesystem::create_symlink(path, addresses_.operator_socket, error);
  return error ? absl::UnavailableError(StrCat(addresses_.operator_socket, ": ", error.message()))
               : absl::OkStatus();
}

StatusAnswer LocalCluster::Status() const {
  StatusAnswer answer;
  for (const Member& member : members_) *answer.add_children() = member.info;
  answer.set_http_host(http_.host);
  answer.set_http_port(http_.port);
  if (http_.tls) {
    const tls::Files client = OwnClientFiles(flags_);
    answer.mutable_http_tls()->set_certificate_file(Absolute(flags_.http_tls.certificate.path));
    answer.mutable_http_tls()->set_client_certificate_file(Absolute(client.certificate.path));
    answer.mutable_http_tls()->set_client_key_file(Absolute(client.key.path));
  }
  return answer;
}

}  // namespace minke::cli
