// Rows moved one by one, and partial sums added up where they lie: what the data plane does with the rows of
// messages in GPU memory (libs/gpu_rows). Tables and host rows may be in page-locked memory, which the
// kernels read over the bus: for a step's few kilobytes of table that is sooner done than a copy first.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

// Either side on the device or in page-locked memory.
struct RowMove {
  void* to = nullptr;
  const void* from = nullptr;
};

// Everything 16-byte aligned, row_bytes too. What is written is read by no move of the same call.
absl::Status MoveRows(const RowMove* moves, int64_t count, int64_t row_bytes, const Stream& stream);

// Bytes of any of the device's memory to ordinary memory, where they are once the stream is synchronised.
absl::Status CopyToHost(void* to, const void* from, int64_t bytes, const Stream& stream);

// For every row i: the rows partials[begin[i]], ..., partials[begin[i + 1] - 1], summed in f32 in this order;
// the first is taken as it is. Then sums[i] = 0 + that, or, with `add`, sums[i] += that. A row with no
// partials: 0, or untouched. Width a multiple of 8, rows 16-byte aligned.
struct CombineArgs {
  const int32_t* begin = nullptr;         // [rows + 1], ascending
  const bf16* const* partials = nullptr;  // rows [width], on the device or in page-locked memory
  float* sums = nullptr;                  // [rows, width], on the device
  int64_t rows = 0, width = 0;
  bool add = false;
};
absl::Status CombineRows(const CombineArgs& args, const Stream& stream);

}  // namespace minke::cuda
