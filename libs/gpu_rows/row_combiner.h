// Adds up partial sums where they lie: in row memory.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace minke {

// Engine thread only.
class RowCombiner {
 public:
  virtual ~RowCombiner() = default;
  // sums [begin.size() - 1, width] f32, in the memory of the same device: row i becomes the sum of the bf16
  // rows partials[begin[i]], ..., partials[begin[i + 1] - 1] of the row memory, in f32 and in this order; 0
  // without any. Waits until it is there. INVALID_ARGUMENT for more rows or partials than it was made for.
  virtual absl::Status Combine(std::span<const int32_t> begin, std::span<const int32_t> partials,
                               float* sums) = 0;
};

}  // namespace minke
