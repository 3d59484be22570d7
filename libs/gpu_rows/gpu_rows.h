// Row memory on the calling thread's current GPU, and what adds up the partial sums in it. A build without
// CUDA says FAILED_PRECONDITION, and so does a machine without a GPU.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "libs/gpu_rows/row_combiner.h"
#include "libs/transport/row_memory.h"

namespace minke {

// One allocation of `blocks` blocks, and page-locked memory for tables and host rows (about 9 MB).
// INVALID_ARGUMENT: row_bytes is no multiple of 16, or there are no rows. RESOURCE_EXHAUSTED, naming the
// bytes: it does not fit.
absl::StatusOr<std::unique_ptr<transport::RowMemory>> MakeGpuRowMemory(int64_t row_bytes,
                                                                       int32_t rows_per_block,
                                                                       int32_t blocks);

// For bf16 rows of `width`, a multiple of 8, on this GPU: at most `rows_max` at a time, of `partials_max`
// partials each. Takes page-locked memory for all of them, as they may all have come to the host.
absl::StatusOr<std::unique_ptr<RowCombiner>> MakeGpuRowCombiner(int64_t width, int64_t rows_max,
                                                                int64_t partials_max);

}  // namespace minke
