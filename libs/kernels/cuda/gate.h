// The gate of a MoE layer in one call: logits = x Wg^T on the tensor cores (bf16 in, f32 sums), softmax over
// all experts, device-limited top-k. What it computes is kernels::RouteToken, row by row:
//   a group's score is its largest logit; the topk_groups best groups stay, the others are out (-inf, not 0);
//   the k largest of the rest, ties to the lower index; weight = p * scale, or p / sum of the chosen if
//   normalised.
// Source: arXiv 2405.04434, section 2.2; docs/mathematics.md.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

enum class GateStatus : uint8_t {
  kRouted = 0,
  kRejected = 1,  // a logit is NaN or infinite: experts -1, weights 0
  kPadding = 2,   // not among the rows in use: the same
};

struct GateArgs {
  // All on the device.
  const bf16* x = nullptr;             // [rows, hidden]
  const bf16* w = nullptr;             // [experts, hidden]
  int64_t rows = 0;                    // at most Options::rows_max
  const int32_t* rows_used = nullptr;  // one value: rows from here on are padding; null: none is
  int32_t* experts = nullptr;          // [rows, k], ascending
  float* weights = nullptr;            // [rows, k]
  uint8_t* status = nullptr;           // [rows], GateStatus
  float* logits = nullptr;             // [rows, experts], or null: for tests
};

// One stream at a time, because runs share the workspace. Runs may be captured into a graph.
class Gate {
 public:
  struct Options {
    int32_t experts = 0;  // 1..256
    int32_t hidden = 0;   // a multiple of 8
    int32_t k = 0;        // 1..32
    int32_t groups = 1;   // 1: any expert may be chosen; at most 32
    int32_t topk_groups = 1;
    float scale = 1;
    bool normalise = false;
    int64_t rows_max = 4096;
    Path path = Path::kAuto;
  };
  // INVALID_ARGUMENT for a shape outside the limits above.
  static absl::StatusOr<Gate> Create(const Options& options);
  absl::Status Run(const GateArgs& args, const Stream& stream);

 private:
  Gate() = default;
  Options options_;
  DeviceInfo device_;
  Path path_ = Path::kPortable;
  int64_t partial_values_ = 0;
  DeviceBuffer partials_;  // [tiles, splits, tile rows, experts, padded] f32
};

}  // namespace minke::cuda
