// Rows that go through the layers together, on the device: their residual stream, and the tables that say
// which token of which sequence each row is.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/mla_decode.h"
#include "libs/kernels/cuda/mla_prefill.h"

namespace minke::cuda_model {

using cuda::DeviceBuffer;
using cuda::Stream;

// New tokens of one sequence: rows of a batch.
struct GpuChunk {
  std::span<const uint32_t> tokens;
  int64_t position_begin = 0;  // of the first token; the tokens before it are in the cache
  std::span<const uint32_t>
      pages;  // of the sequence, in order; enough for position_begin + tokens.size() tokens
};

// Which rows a batch has, as the kernels see it. All pointers are on the device.
struct BatchView {
  int64_t rows = 0;
  int64_t absorbed_rows = 0;             // the first ones; the rest goes through the naive form
  const uint32_t* tokens = nullptr;      // [rows]
  const int32_t* positions = nullptr;    // [rows]
  const uint32_t* pages = nullptr;       // [rows], where the row's latent goes
  const int32_t* sequences = nullptr;    // [absorbed_rows], row of the page table (the generic kernel's)
  const uint32_t* page_table = nullptr;  // [.., stride] of the absorbed rows' sequences
  int64_t stride = 0;
  const int32_t* rows_used = nullptr;  // one value: rows from here on are padding; null: none
};

// Naive chunks whose expanded keys fit the workspace together.
struct NaivePass {
  explicit NaivePass(cuda::MlaPrefill made) : prefill(std::move(made)) {}
  cuda::MlaPrefill prefill;
  int64_t row_begin = 0, rows = 0, keys = 0, sequences = 0, pages_max = 0;
  const int32_t* key_counts = nullptr;   // [sequences], on the device
  const int32_t* key_begin = nullptr;    // [sequences]
  const uint32_t* page_table = nullptr;  // [sequences, pages_max]
};

class GpuBatch {
 public:
  int64_t rows() const { return view.rows; }
  float* x() const { return x_.as<float>(); }          // [rows, hidden], the residual stream
  bf16* normed() const { return normed_.as<bf16>(); }  // [rows, hidden], input of the block under way

  BatchView view;
  // Routed experts' sum [rows, hidden] that the next norm adds to x; null: none. The caller's memory.
  const bf16* pending = nullptr;

 private:
  friend class AttentionOnGpu;
  GpuBatch() = default;

  std::optional<cuda::MlaDecode> decode_;  // empty where its dimensions do not fit the model
  std::vector<NaivePass> passes_;          // the first passes_used_ are this step's
  size_t passes_used_ = 0;
  DeviceBuffer x_, normed_;
  DeviceBuffer angles_;  // [rows, rope] f32: cosines, sines of the rows' positions
  DeviceBuffer tables_;  // of the view and the passes, one upload
  cuda::PinnedBuffer staging_;
  std::optional<cuda::Event> uploaded_;  // staging_ may be written again
  bool uploading_ = false;
};

}  // namespace minke::cuda_model
