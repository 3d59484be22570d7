// Adds partial sums up in host memory posing as a device's: for tests, which have no GPU, and the GPU's
// oracle.
#pragma once

#include "libs/base/dtype.h"
#include "libs/gpu_rows/row_combiner.h"

namespace minke {

class HostRowCombiner final : public RowCombiner {
 public:
  HostRowCombiner(int64_t width, Precision precision) : width_(width), precision_(precision) {}

  absl::Status Combine(std::span<const int32_t> begin, std::span<const PartialSum> partials,
                       float* sums) override {
    for (size_t row = 0; row + 1 < begin.size(); ++row, sums += width_) {
      for (int64_t i = 0; i < width_; ++i) {
        float sum = 0;
        for (int32_t p = begin[row]; p < begin[row + 1]; ++p) {
          const float value = Value(partials[p].row, i);
          sum = p == begin[row] ? value : sum + value;
        }
        sums[i] = 0.0f + sum;
      }
    }
    return absl::OkStatus();
  }

 private:
  float Value(const std::byte* row, int64_t i) const {
    return precision_ == Precision::kExact ? reinterpret_cast<const float*>(row)[i]
                                           : BF16ToF32(reinterpret_cast<const bf16*>(row)[i]);
  }
  const int64_t width_;
  const Precision precision_;
};

}  // namespace minke
