// `minke up`: a whole cluster on this machine, every service a child process. `minke serve`: the same in one
// process.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"

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
  int attention = 1;
  int routers = 1;
  int replicas = 1;               // up only
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
  std::string log_level = "info";
};

void AddUpFlags(CLI::App& app, UpFlags& flags);
void AddServeFlags(CLI::App& app, UpFlags& flags);  // without the pool sizes

// Runs until SIGINT or SIGTERM (OK), or until the cluster cannot start or its gateway dies. `on_ready` is
// called once, on a thread of its own, when /health is 200, with the base URL.
using OnReady = std::function<void(const std::string& url)>;
absl::Status RunUp(const UpFlags& flags, const OnReady& on_ready);
absl::Status RunServe(const UpFlags& flags, const OnReady& on_ready);

}  // namespace minke::cli
