// The flags of `minke bench serve`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "cli/bench/load.h"
#include "cli/bench/request_source.h"
#include "cli/client_tls.h"

namespace CLI {
class App;
}

namespace minke::cli::bench {

struct ServeFlags {
  std::string url = "http://127.0.0.1:8000";
  std::string endpoint = "completions";  // completions | chat
  std::string model;                     // empty: the first of /models
  std::string api_key_file;
  tls::Files tls = ClientTlsFiles();

  std::optional<int64_t> requests;  // neither: 100 requests
  std::optional<double> duration_s;
  int concurrency = 1;
  std::optional<double> rate;  // open loop
  std::string arrival = "poisson";
  int concurrency_max = 4096;
  int64_t warmup = 0;
  double timeout_s = 600;

  std::string prompt_source = "words";  // words | text | random-ids | jsonl
  std::string prompt_file;
  std::string prompt_tokens = "128";
  std::string output_tokens = "128";
  int64_t shared_prefix_tokens = 0;
  double chars_per_token = 4;
  std::string token_ids = "100:30000";
  uint64_t seed = 0;

  double temperature = 0;
  bool ignore_eos = false;
  bool return_token_ids = false;
  bool no_stream_usage = false;
  std::string extra_body;

  std::string json;  // "-": standard output
  bool fail_on_error = false;
};

void AddServeFlags(CLI::App& app, ServeFlags& flags);

// What the flags ask for; INVALID_ARGUMENT or NOT_FOUND name the flag.
absl::StatusOr<Endpoint> ServeEndpoint(const ServeFlags& flags);  // without a path: /v1
absl::StatusOr<RequestOptions> ToRequestOptions(const ServeFlags& flags);
LoadPlan ToLoadPlan(const ServeFlags& flags);
LoadPlan ToWarmupPlan(const ServeFlags& flags);

}  // namespace minke::cli::bench
