// Weights packed once at load in the order the tile kernels read them.
//   exact: f32 [n / 64][k][64];  bf16: [n / 64][ceil(k / 2)][64][2]; columns beyond n and an odd last k are
//   zero.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/functional/function_ref.h"
#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/tile_kernels.h"
#include "libs/model/checkpoint.h"

namespace minke::kernels {

// Anonymous memory, 2 MiB aligned, huge pages where the system has them.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(int64_t bytes);  // zero-filled
  // The same for what lives long, such as weights: small buffers share huge pages, whose memory is given back
  // when the last of its neighbours goes. 64-byte aligned.
  static HugeBuffer Shared(int64_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_bytes_ = 0;           // 0: the memory is chunk_'s
  std::shared_ptr<HugeBuffer> chunk_;  // shared by the buffers in it
};

// The index-th of `of` equal parts of a dimension: of the heads, or of a feed-forward block's inner
// dimension.
struct Share {
  int64_t index = 0, of = 1;
};

// Elements [begin, begin + out.size()) of a row-major weight tensor, widened to f32. Called on the pool's
// threads.
using ElementReader = absl::FunctionRef<void(int64_t begin, std::span<float> out)>;

// Immutable once packed; then thread-safe. A linear layer y [n] = W x [k], W stored [n, k] in the checkpoint.
class PackedMatrix {
 public:
  // read_row(i, out): the i-th of n weight rows, widened to f32 (exact for every supported dtype). Called on
  // the pool's threads.
  using RowReader = absl::FunctionRef<void(int64_t row, std::span<float> out)>;

  PackedMatrix() = default;
  static PackedMatrix Pack(Precision precision, int64_t n, int64_t k, RowReader read_row, ThreadPool& pool);
  // A whole [n, k] tensor.
  static PackedMatrix Pack(Precision precision, const TensorView& tensor, ThreadPool& pool);

  // Not packed yet: zeros, to be written through storage().
  static PackedMatrix Empty(Precision precision, int64_t n, int64_t k);

  // The packed form, the same on every CPU.
  std::span<std::byte> storage() { return {storage_.data(), static_cast<size_t>(storage_.bytes())}; }
  std::span<const std::byte> storage() const {
    return {storage_.data(), static_cast<size_t>(storage_.bytes())};
  }
  Precision precision() const { return precision_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t blocks() const { return (n_ + kBlockColumns - 1) / kBlockColumns; }
  int64_t bytes() const { return storage_.bytes(); }
  const float* block_f32(int64_t block) const;
  const bf16* block_bf16(int64_t block) const;

 private:
  Precision precision_ = Precision::kBF16;
  int64_t n_ = 0, k_ = 0;
  HugeBuffer storage_;
};

}  // namespace minke::kernels
