// What adds up partial sums in a HostRowMemory, for tests, which have no GPU.
#pragma once

#include <algorithm>

#include "libs/base/dtype.h"
#include "libs/gpu_rows/row_combiner.h"
#include "libs/transport/row_memory.h"

namespace minke {

class HostRowCombiner final : public RowCombiner {
 public:
  explicit HostRowCombiner(const transport::RowMemory& memory) : memory_(memory) {}

  absl::Status Combine(std::span<const int32_t> begin, std::span<const int32_t> partials,
                       float* sums) override {
    const int64_t width = memory_.row_bytes() / int64_t{sizeof(bf16)};
    const auto* base = reinterpret_cast<const bf16*>(memory_.base());
    for (size_t row = 0; row + 1 < begin.size(); ++row, sums += width) {
      for (int64_t i = 0; i < width; ++i) {
        float sum = 0;
        for (int32_t p = begin[row]; p < begin[row + 1]; ++p) {
          const float value = BF16ToF32(base[partials[p] * width + i]);
          sum = p == begin[row] ? value : sum + value;
        }
        sums[i] = 0.0f + sum;
      }
    }
    return absl::OkStatus();
  }

 private:
  const transport::RowMemory& memory_;
};

}  // namespace minke
