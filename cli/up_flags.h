// Flags of `minke up` and `minke serve`.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/base/device.h"
#include "libs/base/dtype.h"
#include "libs/node/tls_flags.h"

namespace CLI {
class App;
}

namespace minke::cli {

struct UpFlags {
  std::string checkpoint;
  std::string host = "127.0.0.1";
  int port = 8000;
  int experts = 2;  // pool sizes: up only
  std::string experts_format = "bf16";
  std::string load_from = "auto";
  int attention = 1;
  int routers = 1;
  int replicas = 1;               // up only
  bool supervise = false;         // up only
  std::string registry;           // up only; empty: static, or etcd with several routers
  std::string etcd;               // up only; empty with registry etcd: one of its own
  std::string cluster = "minke";  // up only
  std::string precision = "bf16";
  std::string device = "auto";
  std::string routing = "remote";
  std::string microbatches = "auto";
  std::string mla = "auto";
  int threads = 0;
  int attention_threads = 0;  // up only; 0: as `threads`
  std::string numa = "auto";  // up only
  std::string model_name;
  std::string chat_template = "auto";
  std::string api_key_file;
  std::string operator_token_file;  // up only
  std::string transport = "auto";
  std::string poll = "adaptive";
  int heartbeat_ms = 250;
  int64_t body_max_bytes = 16 << 20;
  int64_t cache_mib = 1024;
  std::string prefix_cache = "on";
  int64_t step_tokens = 512;
  double decode_stretch = 2;
  int64_t sequences = 256;
  int64_t waiting = 1024;
  std::string trace_file;
  int64_t trace_steps = 200;
  int unavailable_after_s = 60;
  std::string targets_file;  // up only; empty: DefaultTargetsFile
  bool vllm_names = false;
  std::string log_level = "info";
  std::string log_format = "text";
  std::string otlp_endpoint;  // empty: no traces
  double trace_ratio = 0.01;
  double slow_request_s = 60;
  node::TlsFlags tls;
  tls::Files http_tls = node::HttpTlsFiles();
};

void AddUpFlags(CLI::App& app, UpFlags& flags);
void AddServeFlags(CLI::App& app, UpFlags& flags);  // without the pool sizes

Precision PrecisionOf(const UpFlags& flags);
bool UsesEtcd(const UpFlags& flags);
bool FP8Experts(const UpFlags& flags);
// What --device comes to, if it can have the precision and the experts' format.
absl::StatusOr<Device> DeviceOf(const UpFlags& flags);
// With what `minke up` and `minke serve` ask their own gateway.
tls::Files OwnClientFiles(const UpFlags& flags);
// The flags of TLS and their files; etcd: as registry.
absl::Status ValidateTls(const UpFlags& flags, bool etcd);
// Whether `minke up` can begin: one line about the first flag, file or program that stands against it.
absl::Status Validate(const UpFlags& flags);

}  // namespace minke::cli
