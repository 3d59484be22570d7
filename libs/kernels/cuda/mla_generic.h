// Weight-absorbed MLA of any dimensions and any number of heads: what MlaDecode and MlaPrefill compute, for
// models they do not fit. Decode steps and prompt chunks alike: every row names its sequence and its
// position. Plain, not fast. Source: arXiv 2405.04434, section 2.1; docs/mathematics.md.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

struct MlaGenericArgs {
  // All on the device.
  const bf16* q = nullptr;               // [rows, heads, rank + rope]: absorbed, rotated
  const bf16* cache = nullptr;           // [pages, 64, rank + rope]
  const uint32_t* page_table = nullptr;  // [sequences, page_table_stride]
  int64_t page_table_stride = 0;
  const int32_t* sequences = nullptr;  // [rows], row of the page table
  const int32_t* positions = nullptr;  // [rows]; a row sees positions 0 ... its own
  bf16* out = nullptr;                 // [rows, heads, rank]
  int64_t rows = 0;
  int32_t heads = 0, rank = 0, rope = 0;  // rank + rope: at most 8,192
  float softmax_scale = 0;
};

absl::Status MlaGeneric(const MlaGenericArgs& args, const Stream& stream);

}  // namespace minke::cuda
