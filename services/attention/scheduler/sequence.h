// One request inside the attention node: tokens, how far the cache holds them, what was asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "libs/base/ids.h"
#include "services/attention/engine/phase_times.h"
#include "services/attention/engine/sequence_trace.h"
#include "services/attention/latent_cache/page_pool.h"
#include "services/attention/sampling/sampler.h"

namespace minke::attention {

// A request as its gateway names it. `session` is this node's number of the gateway's stream.
struct RequestKey {
  uint64_t session = 0;
  uint64_t request = 0;
  uint32_t generation = 0;
  friend auto operator<=>(const RequestKey&, const RequestKey&) = default;
};

struct Request {
  RequestKey key;
  std::vector<uint32_t> prompt;     // not empty
  std::vector<uint32_t> generated;  // streamed before the request came here
  SamplingParams sampling;
  absl::Time received = absl::InfinitePast();         // by this node
  absl::Time waiting_until = absl::InfiniteFuture();  // refused if still not admitted
  absl::Time deadline = absl::InfiniteFuture();       // ends with an error if it is still not through
  NodeId pages_from;                                  // whose latents may be taken over; zero: nobody's
  std::string name;                                   // the client's request id, for logs
  std::string traceparent;                            // of a traced request; else empty
};

enum class FinishReason { kNone, kStop, kLength, kError };

// What one step did for one request.
struct RequestEvent {
  // prefill: of steps with rows of the prompt; decode: the others.
  RequestKey key;
  std::vector<uint32_t> tokens;
  std::vector<TokenLogprobs> logprobs;
  std::vector<TokenLogprobs> prompt_logprobs;
  int64_t cached_prompt_tokens = 0;  // in the first event
  absl::Duration queue_time;         // in the first event
  FinishReason finish = FinishReason::kNone;
  absl::Status error;                      // with kError
  PhaseTimes prefill_times, decode_times;  // in the last event of a request that was computed here
};

struct Sequence {
  explicit Sequence(Request r) : request(std::move(r)), tokens(request.prompt) {
    tokens.insert(tokens.end(), request.generated.begin(), request.generated.end());
    if (request.sampling.repetition_penalty != 1) {
      for (const uint32_t token : request.prompt) ++counts.prompt[token];
    }
    for (const uint32_t token : request.generated) ++counts.generated[token];
  }
  int64_t prompt_size() const { return std::ssize(request.prompt); }
  int64_t generated_size() const { return std::ssize(tokens) - prompt_size(); }

  Request request;
  std::vector<uint32_t> tokens;  // prompt and generated
  int64_t computed = 0;          // tokens whose latents are in the cache
  std::vector<uint32_t> pages;
  Prefix published;  // by which its first `published_pages` pages are found
  int64_t published_pages = 0;
  int64_t cached_tokens =
      -1;  // prompt tokens that came from the cache at the first admission; -1: not yet admitted
  absl::Duration queue_time;  // from receiving it to the first admission
  bool cached_reported = false;
  TokenCounts counts;
  int64_t prompt_logprobs_done = 0;  // prompt tokens 1 ... done were reported; survives recomputation
  bool cancelled = false;
  PhaseTimes prefill_times, decode_times;
  std::unique_ptr<SequenceTrace> trace;  // of a traced request; its spans are recorded with its end
};

}  // namespace minke::attention
