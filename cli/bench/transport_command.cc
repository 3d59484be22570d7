#include "cli/bench/transport_command.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "cli/bench/json_output.h"
#include "cli/bench/transport_report.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/ucx/ucx.h"

namespace minke::cli::bench {
namespace {

using transport::Transport;

constexpr int kStartTimeoutMs = 20'000;

// While it lives, what is written to standard output goes to stderr, of this process and those it starts: UCX
// says what worries it on standard output, where the JSON is to stand alone.
class StandardOutputAside {
 public:
  StandardOutputAside() : saved_(fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3)) {
    std::fflush(stdout);
    if (saved_ >= 0) dup2(STDERR_FILENO, STDOUT_FILENO);
  }
  ~StandardOutputAside() {
    std::fflush(stdout);
    if (saved_ >= 0) {
      dup2(saved_, STDOUT_FILENO);
      close(saved_);
    }
  }
  StandardOutputAside(const StandardOutputAside&) = delete;
  StandardOutputAside& operator=(const StandardOutputAside&) = delete;

 private:
  const int saved_;
};

absl::StatusOr<std::vector<uint32_t>> ParseSizes(const std::string& text) {
  std::vector<uint32_t> sizes;
  for (absl::string_view size : absl::StrSplit(text, ',')) {
    const bool kibi = !size.empty() && (size.back() == 'k' || size.back() == 'K');
    uint32_t value = 0;
    if (!absl::SimpleAtoi(size.substr(0, size.size() - (kibi ? 1 : 0)), &value) || value < 1 ||
        value > wire::kPayloadBytesMax / (kibi ? 1024 : 1)) {
      return absl::InvalidArgumentError(StrCat("--sizes: expected bytes such as 64,10k, each at most ",
                                               wire::kPayloadBytesMax / 1024, "k, found ", text));
    }
    sizes.push_back(value * (kibi ? 1024 : 1));
  }
  return sizes;
}

absl::StatusOr<transport::UcxOptions> ToUcxOptions(const TransportFlags& flags) {
  transport::UcxOptions options{.interface = flags.interface};
  MK_ASSIGN_OR_RETURN(options.selection, transport::ParseUcxSelection(flags.transport));
  options.transport.poll = flags.poll == "spin"    ? transport::PollMode::kSpin
                           : flags.poll == "block" ? transport::PollMode::kBlock
                                                   : transport::PollMode::kAdaptive;
  return options;
}

// The other node, a process of its own. Ends with this object, and with this process.
class UcxServer {
 public:
  static absl::StatusOr<UcxServer> Start(const transport::UcxOptions& options) {
    int report[2];
    if (::pipe2(report, O_CLOEXEC) != 0)
      return absl::ResourceExhaustedError(StrCat("pipe: ", std::strerror(errno)));
    const pid_t parent = ::getpid(), pid = ::fork();  // before any UCX context
    if (pid < 0) return absl::ResourceExhaustedError(StrCat("fork: ", std::strerror(errno)));
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);  // the parent died before the line above
      Serve(options, report[1]);
    }
    ::close(report[1]);
    UcxServer server(pid);
    const std::string line = ReadAll(report[0]);
    ::close(report[0]);
    if (line.rfind(kReady, 0) == 0) {
      server.address_ = line.substr(std::strlen(kReady));
      return server;
    }
    return absl::UnavailableError(line.empty() ? "the other node does not start" : line);
  }
  ~UcxServer() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  UcxServer(UcxServer&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), address_(std::move(other.address_)) {}
  UcxServer& operator=(UcxServer&& other) = delete;

  const std::string& address() const { return address_; }

 private:
  static constexpr const char* kReady = "ready ";

  explicit UcxServer(pid_t pid) : pid_(pid) {}

  [[noreturn]] static void Serve(const transport::UcxOptions& options, int report) {
    const auto transport = CreateUcx({.node_id = kFrameServerId}, options);
    const std::string line =
        transport.ok() ? StrCat(kReady, (*transport)->address()) : std::string(transport.status().message());
    if (::write(report, line.data(), line.size()) < 0 || !transport.ok()) ::_exit(1);
    ::close(report);
    const std::atomic<bool> never{false};
    ServeFrames(**transport, never);
    ::_exit(0);
  }

  // To the end of what the child writes, or as much as came in time.
  static std::string ReadAll(int fd) {
    std::string text;
    pollfd readable{fd, POLLIN, 0};
    while (::poll(&readable, 1, kStartTimeoutMs) > 0) {
      char buffer[512];
      const ssize_t n = ::read(fd, buffer, sizeof buffer);
      if (n <= 0) break;
      text.append(buffer, n);
    }
    return text;
  }

  pid_t pid_;
  std::string address_;
};

std::string HostOf(const std::string& address) {
  const std::string host = address.substr(0, address.rfind(':'));
  return host.front() == '[' ? host.substr(1, host.size() - 2) : host;
}

absl::StatusOr<TransportRow> Measure(FrameClient& client, Transport& transport, const std::string& name,
                                     uint32_t bytes, absl::Duration time) {
  TransportRow row{.name = name, .bytes = bytes};
  MK_ASSIGN_OR_RETURN(row.round_trip, client.MeasureRoundTrips(bytes, time));
  MK_ASSIGN_OR_RETURN(row.dispatch_bytes_per_s, client.MeasureDispatch(bytes, time));
  MK_ASSIGN_OR_RETURN(row.partial_bytes_per_s, client.MeasurePartial(bytes, time));
  const std::vector<transport::PeerStatistics> peers = transport.statistics();
  if (!peers.empty()) row.lanes = peers[0].transport;
  return row;
}

absl::StatusOr<TransportRow::Raw> MeasureRaw(UcxPerftest& perftest, const TransportRow& ours,
                                             absl::Duration time) {
  TransportRow::Raw raw;
  MK_ASSIGN_OR_RETURN(raw.round_trip, perftest.MeasureRoundTrips(ours.bytes, time,
                                                                 absl::Microseconds(ours.round_trip.p50_us)));
  MK_ASSIGN_OR_RETURN(raw.bytes_per_s,
                      perftest.MeasureBandwidth(ours.bytes, time, ours.dispatch_bytes_per_s));
  return raw;
}

}  // namespace

void AddTransportFlags(CLI::App& app, TransportFlags& flags) {
  app.add_option("--transport", flags.transport,
                 "auto: RDMA where UCX finds it, shared memory on loopback, else TCP")
      ->check(CLI::IsMember({"auto", "shm", "tcp", "rdma"}))
      ->capture_default_str();
  app.add_option("--interface,--ucx-interface", flags.interface, "network interface, or its address")
      ->capture_default_str();
  app.add_option("--poll", flags.poll, "how a node waits")
      ->check(CLI::IsMember({"adaptive", "spin", "block"}))
      ->capture_default_str();
  app.add_option("--sizes", flags.sizes, "payloads in bytes, separated by commas; k: KiB")
      ->capture_default_str();
  app.add_option("--min-time", flags.min_time_s, "seconds for each number, at least")
      ->check(CLI::Range(0.001, 600.0))
      ->capture_default_str();
  app.add_option("--json", flags.json,
                 "write the result there too; -: to standard output, the table to stderr");
}

absl::Status RunTransport(const TransportFlags& flags, const std::string& version, std::ostream& out) {
  log::SetLevel(log::Level::kError);
  MK_RETURN_IF_ERROR(CheckWritable(flags.json));
  MK_ASSIGN_OR_RETURN(const std::vector<uint32_t> sizes, ParseSizes(flags.sizes));
  MK_ASSIGN_OR_RETURN(const transport::UcxOptions options, ToUcxOptions(flags));
  const absl::Duration time = absl::Seconds(flags.min_time_s);
  TransportReport report{.version = version,
                         .transport = flags.transport,
                         .interface = flags.interface,
                         .poll = flags.poll,
                         .min_time_s = flags.min_time_s};
  std::ostream& table = TableStream(flags.json, out);
  std::optional<StandardOutputAside> aside;
  if (flags.json == "-") aside.emplace();
  const auto add = [&](TransportRow row) {
    table << FormatTransportRow(row) << std::flush;
    report.rows.push_back(std::move(row));
  };

  {
    MK_ASSIGN_OR_RETURN(const UcxServer server, UcxServer::Start(options));
    MK_ASSIGN_OR_RETURN(const std::unique_ptr<Transport> transport,
                        CreateUcx({.node_id = kFrameClientId}, options));
    FrameClient client(*transport);
    MK_RETURN_IF_ERROR(client.Connect(server.address()));
    MK_ASSIGN_OR_RETURN(const Variables settings, UcxEnvironment(options));
    absl::StatusOr<UcxPerftest> perftest = UcxPerftest::Create(HostOf(server.address()), settings);
    if (!perftest.ok())
      report.raw_missing = StrCat(perftest.status().message(), " (Debian: apt install ucx-utils)");
    table << TransportTableHead(report) << std::flush;
    for (const uint32_t bytes : sizes) {
      MK_ASSIGN_OR_RETURN(TransportRow row, Measure(client, *transport, "ucx", bytes, time));
      if (perftest.ok()) {
        const absl::StatusOr<TransportRow::Raw> raw = MeasureRaw(*perftest, row, time);
        if (raw.ok()) {
          row.raw = *raw;
        } else {
          row.raw_error = std::string(raw.status().message());
        }
      }
      add(std::move(row));
    }
  }

  transport::InprocHub hub;
  const auto server = CreateInproc(hub, {.node_id = kFrameServerId}, options.transport);
  const auto transport = CreateInproc(hub, {.node_id = kFrameClientId}, options.transport);
  std::atomic<bool> stop{false};
  std::thread thread([&] { ServeFrames(*server, stop); });
  FrameClient client(*transport);
  absl::Status status = client.Connect(server->address());
  for (size_t i = 0; i < sizes.size() && status.ok(); ++i) {
    absl::StatusOr<TransportRow> row = Measure(client, *transport, "inproc", sizes[i], time);
    status = row.status();
    if (row.ok()) add(*std::move(row));
  }
  stop = true;
  server->Wake();
  thread.join();
  MK_RETURN_IF_ERROR(status);
  aside.reset();
  return WriteJson(flags.json, FormatTransportJson(report), out);
}

}  // namespace minke::cli::bench
