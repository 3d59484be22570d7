// Naive MLA over expanded keys and values, for prompts: per head, causal,
//   out_i = sum_{j <= position of i} softmax_j(softmax_scale * (q_nope_i . k_nope_j + q_rope_i . k_rope_j))
//   v_j
// Any mix of lengths in one launch. A chunk of a prompt attends to its cached prefix too: the prefix is
// expanded before its keys, and the chunk's queries are the last ones. Source: arXiv 2405.04434, section 2.1;
// docs/mathematics.md; docs/gpu.md for the schedule.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

struct PrefillSequence {
  int32_t queries = 0;  // rows of q and out
  int32_t keys = 0;     // rows of k and v; query i is at position keys - queries + i
};

// Row r, head h begins at data + r * row + h * head (elements, multiples of 8). head = 0: all heads share the
// row.
struct HeadRows {
  const bf16* data = nullptr;
  int64_t row = 0, head = 0;
};

struct MlaPrefillArgs {
  const bf16* q = nullptr;  // [rows, heads, 192]: 128 without position, 64 rotated
  HeadRows k;               // 128 wide
  HeadRows k_rope;          // 64 wide
  HeadRows v;               // 128 wide
  bf16* out = nullptr;      // [rows, heads, 128]
  float* lse = nullptr;     // [rows, heads], natural logarithm of the softmax denominator; may be null
};

// Read by the kernels.
struct PrefillSpan {
  int32_t query_begin, queries;
  int32_t key_begin, keys;
  int32_t tile_begin;  // tiles of the spans before this one
  int32_t unused[3];
};

// Thread-compatible; one user and one stream at a time.
class MlaPrefill {
 public:
  struct Options {
    int32_t heads = 0;
    float softmax_scale = 0;
    int32_t sequences_max = 1024;
    Path path = Path::kAuto;
    int32_t variant = 0;  // of the Hopper kernel, for measurements; 0 is the one to use
  };
  static absl::StatusOr<MlaPrefill> Create(const Options& options);

  // Uploads a batch's spans in stream order; once per step. Sequences without queries are allowed.
  // INVALID_ARGUMENT if a sequence has fewer keys than queries.
  absl::Status Plan(std::span<const PrefillSequence> sequences, const Stream& stream);
  absl::Status Run(const MlaPrefillArgs& args, const Stream& stream);

 private:
  MlaPrefill() = default;

  Options options_;
  DeviceInfo device_;
  Path path_ = Path::kPortable;
  std::vector<PrefillSpan> spans_;  // longest first
  int64_t queries_ = 0, keys_ = 0;
  int32_t tiles_ = 0;
  DeviceBuffer table_;
  DeviceBuffer counters_;  // next tile, blocks that are done; zero between launches
};

}  // namespace minke::cuda
