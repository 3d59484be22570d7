// One decode step of weight-absorbed MLA over the paged latent cache: for every query row, over the tokens it
// sees,
//   s_j = softmax_scale * q . latent_j        (576 wide: 512 latent, 64 rotated)
//   out = sum_j softmax(s)_j latent_j[0:512]
// Scores and sums are f32, probabilities are rounded to bf16 before they meet the latents.
// Source: arXiv 2405.04434, section 2.1; docs/mathematics.md; docs/gpu.md for the schedule.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/mla_decode_plan.h"

namespace minke::cuda {

inline constexpr int kLatentDim = 576;
inline constexpr int kLatentRank = 512;

struct MlaDecodeArgs {
  // All on the device.
  const bf16* q = nullptr;  // [tokens, heads, 576]: absorbed 512, rotated 64; the sequences' queries in order
  const bf16* cache = nullptr;  // [cache_pages, 64, 576]; slots past a sequence's length may hold anything
  int64_t cache_pages = 0;
  const uint32_t* page_table = nullptr;  // [sequences, page_table_stride], entries < cache_pages
  int64_t page_table_stride = 0;
  bf16* out = nullptr;   // [tokens, heads, 512]
  float* lse = nullptr;  // [tokens, heads], natural logarithm of the softmax denominator; may be null
};

// Thread-compatible; one user and one stream at a time, because the workspace is shared by its steps.
class MlaDecode {
 public:
  struct Options {
    int32_t heads = 0;  // 16..128, a multiple of 16
    float softmax_scale = 0;
    int32_t sequences_max = 1024;
    Path path = Path::kAuto;
    int32_t variant = 0;  // of the Hopper kernel, for measurements; 0: the one to use; 1: blocks of 64 rows
    // 0: the default of MlaDecodePlanLimits; for measurements: < 0: items are cut wherever that balances
    // better
    int32_t combine_cost = 0;
  };
  static absl::StatusOr<MlaDecode> Create(const Options& options);

  // Shares a batch out and uploads the plan in stream order. Once per step: all layers use it. The device
  // addresses stay, so a captured graph of Run may be replayed after a new Plan of a batch of the same number
  // of tokens.
  absl::Status Plan(std::span<const DecodeSequence> sequences, const Stream& stream);
  // Launches the step for one layer.
  absl::Status Run(const MlaDecodeArgs& args, const Stream& stream);

  const MlaDecodePlan& plan() const { return plan_; }

 private:
  MlaDecode() = default;

  Options options_;
  DeviceInfo device_;
  Path path_ = Path::kPortable;
  int32_t blocks_per_worker_ = 1;
  MlaDecodePlanLimits limits_;
  MlaDecodePlan plan_;
  int64_t items_max_ = 0;
  std::vector<char> staging_;
  DeviceBuffer tables_;    // header, worker_begin, combines, segments
  DeviceBuffer partials_;  // [splits, item_rows, 512] f32
  DeviceBuffer sums_;      // [splits, item_rows] f32: log2 of each partial's denominator
};

}  // namespace minke::cuda
