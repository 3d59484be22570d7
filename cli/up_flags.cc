#include "cli/up_flags.h"

#include <CLI/CLI.hpp>

#include "cli/client_tls.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/etcd/server_command.h"
#include "libs/model/checkpoint.h"
#include "libs/node/node.h"
#include "services/experts/expert_service.h"
#include "services/gateway/request_flags.h"

namespace minke::cli {
namespace {

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
  app.add_flag("--metrics-vllm-names", f.vllm_names,
               "/metrics of the HTTP API also shows the cluster as one vLLM server would");
  app.add_option("--otlp-endpoint", f.otlp_endpoint,
                 "http://HOST:PORT of an OpenTelemetry collector (OTLP over HTTP) for traces of requests");
  gateway::AddRequestFlags(app, f.trace_ratio, f.slow_request_s);
  app.add_option("--log-format", f.log_format, "lines of text, or a JSON object each")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  node::AddHttpTlsFlags(app, f.http_tls);
  app.add_option("--log-level", f.log_level)
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
}

}  // namespace

void AddUpFlags(CLI::App& app, UpFlags& f) {
  AddSharedFlags(app, f);
  node::AddTlsFlags(app, f.tls);
  app.add_option("--experts", f.experts, "expert servers")->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--attention", f.attention, "attention nodes")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--routers", f.routers, "routers")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--replicas", f.replicas, "servers per (layer, group)")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--operator-token-file", f.operator_token_file,
                 "tokens that may scale and drain from the console, one per line (default: nobody may)");
  app.add_flag("--supervise", f.supervise, "start what dies again");
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
  app.add_option("--load-from", f.load_from,
                 "units of a new expert server: from the checkpoint, or from a server that has them; auto: "
                 "the faster")
      ->check(CLI::IsMember({"auto", "checkpoint", "replica"}))
      ->capture_default_str();
  app.add_option("--poll", f.poll)
      ->check(CLI::IsMember({"adaptive", "spin", "block"}))
      ->capture_default_str();
  app.add_option("--heartbeat-ms", f.heartbeat_ms)->check(CLI::Range(10, 60000))->capture_default_str();
  app.add_option("--targets-file", f.targets_file,
                 "where Prometheus' file discovery finds the processes (default: "
                 "/tmp/minke-up-UID-PORT.targets.json)");
}

void AddServeFlags(CLI::App& app, UpFlags& flags) {
  AddSharedFlags(app, flags);
  node::AddTlsFlags(app, flags.tls, /*etcd=*/false);
}

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

tls::Files OwnClientFiles(const UpFlags& flags) {
  tls::Files files = ClientTlsFiles();
  if (flags.http_tls.ca.path.empty()) return files;
  files.certificate = flags.tls.cluster.certificate;
  files.key = flags.tls.cluster.key;
  return files;
}

absl::Status ValidateTls(const UpFlags& flags, bool etcd) {
  MK_RETURN_IF_ERROR(node::CheckTls(flags.tls, etcd));
  MK_RETURN_IF_ERROR(tls::CheckComplete(flags.http_tls, tls::Use::kServer));
  if (!flags.http_tls.ca.path.empty() && flags.tls.cluster.empty()) {
    return absl::InvalidArgumentError(
        "--http-tls-client-ca: expected --tls-cert beside it, with which /health is asked, found none");
  }
  // Said once here, not by every child.
  if (!flags.tls.cluster.empty()) MK_RETURN_IF_ERROR(tls::Load(flags.tls.cluster, tls::Use::kPeer).status());
  if (!flags.tls.etcd.empty()) MK_RETURN_IF_ERROR(tls::Load(flags.tls.etcd, tls::Use::kClient).status());
  if (!flags.http_tls.empty()) MK_RETURN_IF_ERROR(tls::Load(flags.http_tls, tls::Use::kServer).status());
  return absl::OkStatus();
}

absl::Status Validate(const UpFlags& flags) {
  MK_RETURN_IF_ERROR(ValidateTls(flags, UsesEtcd(flags)));
  if (!flags.tls.etcd.empty() && flags.etcd.empty()) {
    return absl::InvalidArgumentError(
        "--etcd-ca: expected --etcd beside it, found none: an etcd of minke up's own has --tls-cert");
  }
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

}  // namespace minke::cli
