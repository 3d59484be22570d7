// Adds up partial sums where they lie: on a device, or in host memory if they came there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace minke {

struct PartialSum {
  const std::byte* row = nullptr;  // [width] Act
  bool in_host_memory = false;     // else the device's
};

// Engine thread only.
class RowCombiner {
 public:
  virtual ~RowCombiner() = default;
  // sums [begin.size() - 1, width] f32, in the device's memory: row i becomes the sum of partials[begin[i]],
  // ..., partials[begin[i + 1] - 1], in f32 and in this order; 0 without any. Waits until it is there.
  // INVALID_ARGUMENT for more rows or partials than it was made for.
  virtual absl::Status Combine(std::span<const int32_t> begin, std::span<const PartialSum> partials,
                               float* sums) = 0;
};

}  // namespace minke
