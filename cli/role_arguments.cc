#include "cli/role_arguments.h"

#include "libs/base/strings.h"

namespace minke::cli {
namespace {

using Arguments = std::vector<std::string>;

Arguments Join(std::initializer_list<Arguments> parts) {
  Arguments all;
  for (const Arguments& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Not `--cpus=`: an empty value would be taken from the next argument. So below.
Arguments Unless(const std::string& value, const std::string& flag) {
  return value.empty() ? Arguments{} : Arguments{flag + value};
}

// Files only: what is secret is in them.
Arguments TlsFiles(const tls::Files& files) {
  Arguments all;
  for (const tls::File* file : {&files.certificate, &files.key, &files.ca})
    if (!file->path.empty()) all.push_back(StrCat(file->flag, "=", file->path));
  return all;
}

Arguments Common(const UpFlags& flags) {
  return Join({{"--checkpoint=" + flags.checkpoint, "--precision=" + flags.precision,
                "--log-level=" + flags.log_level, "--log-format=" + flags.log_format},
               TlsFiles(flags.tls.cluster),
               Unless(flags.tls.name, "--tls-name=")});
}

Arguments DataPlane(const UpFlags& flags, const LocalAddresses& addresses, const std::string& device) {
  return {"--cluster-secret-file=" + addresses.secret_file, "--transport=" + flags.transport,
          "--poll=" + flags.poll, StrCat("--heartbeat-ms=", flags.heartbeat_ms), "--device=" + device};
}

Arguments EtcdRegistry(const UpFlags& flags, const LocalAddresses& addresses) {
  return Join({{"--registry=etcd", "--etcd=" + addresses.etcd, "--cluster=" + flags.cluster},
               TlsFiles(addresses.etcd_tls)});
}

// Of all but routers.
Arguments Registry(const UpFlags& flags, const LocalAddresses& addresses) {
  return addresses.etcd.empty() ? Arguments{"--router=" + addresses.router} : EtcdRegistry(flags, addresses);
}

}  // namespace

Arguments RouterArguments(const UpFlags& flags, const LocalAddresses& addresses, int experts) {
  // Its gate is worth a GPU only where rows come to the GPU's memory, which it finds out itself.
  const std::string device = flags.device == "cuda" ? "auto" : flags.device;
  return Join({Common(flags),
               DataPlane(flags, addresses, device),
               addresses.etcd.empty() ? Arguments{} : EtcdRegistry(flags, addresses),
               Unless(addresses.router, "--listen="),
               {StrCat("--threads=", flags.threads), StrCat("--experts=", experts),
                StrCat("--replicas=", flags.replicas)}});
}

Arguments ExpertArguments(const UpFlags& flags, const LocalAddresses& addresses, const std::string& cpus) {
  return Join({Common(flags),
               DataPlane(flags, addresses, flags.device),
               Registry(flags, addresses),
               Unless(cpus, "--cpus="),
               {StrCat("--threads=", flags.threads), "--experts-format=" + flags.experts_format,
                "--load-from=" + flags.load_from}});
}

Arguments AttentionArguments(const UpFlags& flags, const LocalAddresses& addresses, const std::string& cpus,
                             bool trace) {
  const int threads = flags.attention_threads > 0 ? flags.attention_threads : flags.threads;
  return Join(
      {Common(flags),
       DataPlane(flags, addresses, flags.device),
       Registry(flags, addresses),
       Unless(cpus, "--cpus="),
       Unless(flags.otlp_endpoint, "--otlp-endpoint="),
       {StrCat("--threads=", threads), "--routing=" + flags.routing, "--microbatches=" + flags.microbatches,
        "--mla=" + flags.mla, StrCat("--cache-mib=", flags.cache_mib), "--prefix-cache=" + flags.prefix_cache,
        StrCat("--step-tokens=", flags.step_tokens), StrCat("--sequences=", flags.sequences),
        StrCat("--decode-stretch=", flags.decode_stretch), StrCat("--waiting=", flags.waiting),
        StrCat("--unavailable-after-s=", flags.unavailable_after_s)},
       trace && !flags.trace_file.empty()
           ? Arguments{"--trace-file=" + flags.trace_file, StrCat("--trace-steps=", flags.trace_steps)}
           : Arguments{}});
}

Arguments GatewayArguments(const UpFlags& flags, const LocalAddresses& addresses) {
  return Join(
      {Common(flags),
       Registry(flags, addresses),
       {"--http-listen=" + addresses.http, StrCat("--body-max-bytes=", flags.body_max_bytes),
        "--chat-template=" + flags.chat_template, StrCat("--heartbeat-ms=", flags.heartbeat_ms),
        StrCat("--unavailable-after-s=", flags.unavailable_after_s)},
       {StrCat("--trace-ratio=", flags.trace_ratio), StrCat("--slow-request-s=", flags.slow_request_s)},
       Unless(flags.otlp_endpoint, "--otlp-endpoint="),
       TlsFiles(flags.http_tls),
       flags.vllm_names ? Arguments{"--metrics-vllm-names"} : Arguments{},
       Unless(flags.model_name, "--model-name="),
       Unless(flags.api_key_file, "--api-key-file="),
       Unless(addresses.operator_socket, "--operator-socket="),
       Unless(flags.operator_token_file, "--operator-token-file=")});
}

}  // namespace minke::cli
