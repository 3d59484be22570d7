// What the four programs have in common: flags, the transport they ask for, and living until a signal.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "libs/base/device.h"
#include "libs/base/dtype.h"
#include "libs/model/checkpoint.h"
#include "libs/registry/registry.h"
#include "libs/telemetry/metrics_server.h"
#include "libs/transport/transport.h"

namespace CLI {
class App;
}

namespace minke::node {

struct NodeFlags {
  std::string checkpoint;
  std::string precision = "bf16";      // exact | bf16
  std::string device = "auto";         // cpu | cuda | auto
  std::string listen = "127.0.0.1:0";  // gRPC
  std::string advertise;               // host by which others reach this one
  std::string ucx_interface = "lo";
  uint16_t ucx_port = 0;
  std::string transport = "auto";  // auto | shm | tcp | rdma
  std::string poll = "adaptive";   // adaptive | spin | block
  int heartbeat_ms = 250;
  int row_memory_mib = 512;  // on a GPU; 0: rows are staged
  std::string cluster_secret_file;
  std::string metrics_listen = "127.0.0.1:0";
  int threads = 0;   // 0: all cores it may run on
  std::string cpus;  // "0-7,16": run there only; empty: anywhere
  int drain_timeout_s = 120;
  std::string log_level = "info";
  std::string log_format = "text";  // text | json
  int report_fd = -1;               // `minke up`: where to write the addresses once it listens

  Precision ParsedPrecision() const { return precision == "exact" ? Precision::kExact : Precision::kBF16; }
  int Threads() const;
};

struct RegistryFlags {
  std::string registry = "static";  // static | etcd
  std::string router;               // static: HOST:PORT
  std::string etcd;                 // HOST:PORT[,HOST:PORT...]
  std::string cluster = "minke";
};

// Flags every role has.
void AddCommonFlags(CLI::App& app, NodeFlags& flags);
// Where the cluster's registry is. --router: not for routers, which are the static one.
void AddRegistryFlags(CLI::App& app, RegistryFlags& flags, bool with_router = true);
// INVALID_ARGUMENT names the flag that is missing or has no use.
absl::StatusOr<registry::RegistryAddress> ToRegistryAddress(const RegistryFlags& flags,
                                                            bool with_router = true);
struct TraceFlags {
  std::string otlp_endpoint;  // empty: no traces
};
// Flags of the roles that requests pass through.
void AddTraceFlags(CLI::App& app, TraceFlags& flags);
// Level and format of log lines, as the flags name them.
void SetLogs(const std::string& level, const std::string& format);
// Flags of the roles with a data plane.
void AddDataPlaneFlags(CLI::App& app, NodeFlags& flags);
// Parses; prints one line on stderr for a bad flag and returns the exit code, or -1 to go on. Applies log
// level and process name.
int ParseFlags(CLI::App& app, int argc, char** argv, const std::string& process_name, const NodeFlags& flags);

// What --device and --precision come to. auto: the GPU where there is one and it can compute so, else the
// CPU. FAILED_PRECONDITION for a GPU that this build or this machine has not, INVALID_ARGUMENT for one that
// should compute exactly.
absl::StatusOr<Device> ChooseDevice(const std::string& device, Precision precision);
absl::StatusOr<std::string> ReadSecret(const std::string& file);
// How a node speaks to the others.
struct DataPlane {
  // Null where transport->row_memory() is. Must outlive the transport and what has its frames.
  std::unique_ptr<transport::RowMemory> rows;
  std::unique_ptr<transport::Transport> transport;
};
// A UCX transport by the flags, for a node with a fresh id; on a GPU with row memory there, if UCX can use
// it. One log line then says which: rows=gpu, or rows=staged and why.
absl::StatusOr<DataPlane> MakeDataPlane(const NodeFlags& flags, uint8_t role, const Checkpoint& checkpoint,
                                        Device device);

// Blocks SIGINT and SIGTERM for this thread and all it starts. Call first thing in main.
void BlockSignals();
// For commands that need no orderly end: a signal ends them at once.
void UnblockSignals();
// Waits for SIGINT (stop) or SIGTERM (drain, then stop). Returns its number.
int WaitForSignal();
// Whether one of them has come since: a second one ends a drain.
bool SignalPending();
// Writes "ADDRESS METRICS\n" to the report descriptor, if there is one, and closes it. `address`: of the gRPC
// server, or what else the parent waits for; `metrics`: HOST:PORT of /metrics. Both may be empty.
void ReportAddress(const NodeFlags& flags, const std::string& address, const std::string& metrics);
// "name: message" on stderr; returns 1.
int Fail(const std::string& process_name, const absl::Status& status);

// /metrics by the flags, and a log line that says where: what every process and every transport shows, and
// what `collector` adds. `transport` has to outlive the server. `identity`: null for plain HTTP.
absl::StatusOr<std::unique_ptr<telemetry::MetricsServer>> ServeMetrics(
    const NodeFlags& flags, std::string_view role, const transport::Transport& transport,
    telemetry::Collector collector, std::shared_ptr<tls::Identity> identity);

}  // namespace minke::node
