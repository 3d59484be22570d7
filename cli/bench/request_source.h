// The requests of a run: the same seed gives the same requests, in whatever order they are asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/distribution.h"

namespace minke::cli::bench {

enum class PromptSource {
  kWords,      // random short English words
  kText,       // random passages of a file
  kRandomIds,  // token ids, of which the server needs no tokenizer; completions only
  kJsonl,      // request bodies, one a line, in the file's order and again from its begin
};

struct RequestOptions {
  bool chat = false;  // else completions; kJsonl: the line decides
  PromptSource source = PromptSource::kWords;
  std::string prompt_file;                            // kText, kJsonl
  std::string prompt_tokens = "128";                  // LengthDistribution
  std::string output_tokens = "128";                  // LengthDistribution
  int64_t shared_prefix_tokens = 0;                   // in front of every prompt, on top of its length
  double chars_per_token = 4;                         // kWords, kText: how much text is sent for a token
  int64_t token_id_min = 100, token_id_max = 30'000;  // kRandomIds
  uint64_t seed = 0;
  double temperature = 0;
  bool stream_usage = true;       // ask for the usage event; a plain field, yet some servers refuse it
  bool ignore_eos = false;        // extension of most open servers
  bool return_token_ids = false;  // extension of vLLM and Minke
  std::string extra_body;         // JSON object merged into every request, last
};

struct Request {
  std::string path;  // "/completions" or "/chat/completions"
  std::string body;  // JSON
  // How many tokens the prompt was made for: exact for token ids, a guess for text, nothing for recorded
  // ones.
  std::optional<int64_t> prompt_tokens;
};

// Immutable after Create, thread-safe.
class RequestSource {
 public:
  // INVALID_ARGUMENT or NOT_FOUND name the flag.
  static absl::StatusOr<RequestSource> Create(RequestOptions options);
  ~RequestSource();
  RequestSource(RequestSource&&) noexcept;

  // Requests from 0 on are the run's; those below 0 warm up and never repeat the run's prompts, but for the
  // shared prefix (and for recorded requests, which are taken from the file's end).
  Request Make(int64_t index, const std::string& model) const;

 private:
  struct Recorded;
  RequestSource(RequestOptions options, LengthDistribution prompt, LengthDistribution output);

  std::string RandomIds(Random& random, int64_t tokens) const;  // "1,2,3"
  std::string Text(Random& random, int64_t tokens) const;

  RequestOptions options_;
  LengthDistribution prompt_tokens_, output_tokens_;
  std::string text_;                    // kText
  std::unique_ptr<Recorded> recorded_;  // kJsonl
  std::string shared_prefix_;           // as RandomIds or Text made it
};

}  // namespace minke::cli::bench
