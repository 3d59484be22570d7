// Linear layers through cuBLASLt: y = x W^T with W [n, k] as checkpoints store it, bf16 in, f32 accumulation.
// The algorithm for a shape is asked for once and kept, so a shape gives the same bits every time it runs.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

enum class LinearOutput : uint8_t {
  kBF16,
  kF32,
  kAddF32,  // y += x W^T: a residual add for free
};

// Strides count elements.
struct LinearArgs {
  const bf16* x = nullptr;  // row r at x + r * x_row, k values
  int64_t x_row = 0;
  const bf16* w = nullptr;  // [n, k]
  void* y = nullptr;        // row r at y + r * y_row, n values
  int64_t y_row = 0;
  int64_t rows = 0, n = 0, k = 0;
  LinearOutput output = LinearOutput::kBF16;
};

// One product per head: y[r, h] = W[h] x[r, h] (w_is_kn: x[r, h] W[h]).
struct HeadLinearArgs {
  const bf16* x = nullptr;  // row r, head h at x + r * x_row + h * x_head, k values
  int64_t x_row = 0, x_head = 0;
  const bf16* w = nullptr;  // head h at w + h * w_head: [n, k], or [k, n] if w_is_kn
  int64_t w_head = 0;
  bool w_is_kn = false;
  bf16* y = nullptr;  // row r, head h at y + r * y_row + h * y_head, n values
  int64_t y_row = 0, y_head = 0;
  int64_t rows = 0, n = 0, k = 0, heads = 0;
};

// Owns a workspace, so one stream at a time; a second stream wants a second Linear. Thread-compatible. Runs
// may be captured into a graph. Rows of 0 do nothing. FAILED_PRECONDITION if cuBLASLt knows no algorithm for
// a shape.
class Linear {
 public:
  static absl::StatusOr<Linear> Create();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();
  absl::Status Run(const LinearArgs& args, const Stream& stream);
  absl::Status Run(const HeadLinearArgs& args, const Stream& stream);

 private:
  struct Impl;
  explicit Linear(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::cuda
