// Products of activations with packed weights.
//
// Activations ("Act" below) are rows of f32 in exact mode and bf16 otherwise; pointers to them are std::byte*
// and strides count elements. Products and sums are f32. A row's result never depends on the rows beside it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/packed_matrix.h"

namespace minke::kernels {

// c [m, w.n()] f32 = a [m, w.k()] Act x w^T.
void MatMul(const PackedMatrix& w, const std::byte* a, int64_t lda, int64_t m, float* c, int64_t ldc,
            ThreadPool& pool);

// Columns [block * 64, +64) of the same, on this thread; `columns` of them are written.
void MatMulBlock(const PackedMatrix& w, int64_t block, const std::byte* a, int64_t lda, int64_t m, float* c,
                 int64_t ldc);
// The same of `blocks` neighbouring blocks; block j's columns go to c + j * c_block.
void MatMulBlocks(const PackedMatrix& w, int64_t block, int64_t blocks, const std::byte* a, int64_t lda,
                  int64_t m, float* c, int64_t c_block, int64_t ldc);
// How many neighbouring blocks a task should take, so that few rows read the weights in several streams, when
// there are `tasks` of one block for `threads`. At most kStreamsMax.
int64_t BlocksPerTask(const PackedMatrix& w, int64_t m, int64_t tasks, int threads);
inline constexpr int64_t kStreamsMax = 4;
inline int64_t BlockWidth(const PackedMatrix& w, int64_t block) {
  return std::min(kBlockColumns, w.n() - block * kBlockColumns);
}

// Rounds n values to the activation dtype / widens them.
void ToActivation(Precision precision, const float* x, std::byte* out, int64_t n);
void FromActivation(Precision precision, const std::byte* x, float* out, int64_t n);

// Scratch memory that only ever grows; contents are undefined after Resize. 64-byte aligned.
template <typename T>
class Scratch {
 public:
  T* Resize(int64_t n) {
    if (n > capacity_) {
      capacity_ = n;
      storage_ = HugeBuffer(n * static_cast<int64_t>(sizeof(T)) + 64);
    }
    return data();
  }
  T* data() const { return reinterpret_cast<T*>(storage_.data()); }

 private:
  int64_t capacity_ = 0;
  HugeBuffer storage_;
};

}  // namespace minke::kernels
