// Flags of an attention node, shared by minke-attention and `minke serve`.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/attention/attention_service.h"

namespace CLI {
class App;
}

namespace minke::attention {

struct AttentionFlags {
  std::string routing = "remote";     // remote | local
  std::string microbatches = "auto";  // auto | 1 ... 8
  std::string mla = "auto";           // auto | absorbed | naive
  int tensor_parallel = 1;
  std::string weights_from;         // host:port; empty: the checkpoint
  int64_t cache_mib = 1024;         // latent cache
  std::string prefix_cache = "on";  // on | off
  int64_t step_tokens = 512;
  double decode_stretch = 2;
  int64_t sequences = 256;
  int64_t waiting = 1024;
  std::string trace_file;
  int64_t trace_steps = 200;
  int unavailable_after_s = 60;  // wait for unreachable experts before a request fails
};

void AddAttentionFlags(CLI::App& app, AttentionFlags& flags);
// Also reads the checkpoint's tokenizer, if it has one, for the ids that may be sampled.
absl::StatusOr<AttentionServiceOptions> ToServiceOptions(const AttentionFlags& flags,
                                                         const Checkpoint& checkpoint, Precision precision);

}  // namespace minke::attention
