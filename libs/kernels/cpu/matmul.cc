#include "libs/kernels/cpu/matmul.h"

#include <algorithm>

namespace minke::kernels {
namespace {

// A task should outlast handing it to another thread (about 1 µs): 32 KiB of weights at 15 GB/s are 2 µs.
constexpr int64_t kTaskWeightBytes = 32 * 1024;
// Rows of one task: the activations of a task stay in the L2 cache (96 x 5120 x 2 B < 1 MiB).
constexpr int64_t kTaskRows = 96;

}  // namespace

void MatMulBlock(const PackedMatrix& w, int64_t block, const std::byte* a, int64_t lda, int64_t m, float* c,
                 int64_t ldc) {
  const TileKernels& tiles = Tiles();
  if (w.precision() == Precision::kExact) {
    tiles.gemm_f32(w.block_f32(block), kBlockColumns, reinterpret_cast<const float*>(a), lda, c, ldc, m,
                   BlockWidth(w, block), w.k(), /*accumulate=*/false);
  } else {
    tiles.gemm_bf16(w.block_bf16(block), reinterpret_cast<const bf16*>(a), lda, c, ldc, m,
                    BlockWidth(w, block), w.k(),
                    /*accumulate=*/false);
  }
}

void MatMulBlocks(const PackedMatrix& w, int64_t block, int64_t blocks, const std::byte* a, int64_t lda,
                  int64_t m, float* c, int64_t c_block, int64_t ldc) {
  // The last block may be narrower than the others.
  const int64_t full = std::min(blocks, w.n() / kBlockColumns - block);
  if (w.precision() == Precision::kBF16 && full > 1 && Tiles().streams_bf16(m) > 1) {
    Tiles().gemm_streams_bf16(w.block_bf16(block), w.block_bf16(block + 1) - w.block_bf16(block), full,
                              reinterpret_cast<const bf16*>(a), lda, c, c_block, ldc, m, w.k());
  } else {
    for (int64_t b = 0; b < full; ++b) MatMulBlock(w, block + b, a, lda, m, c + b * c_block, ldc);
  }
  for (int64_t b = std::max(int64_t{0}, full); b < blocks; ++b)
    MatMulBlock(w, block + b, a, lda, m, c + b * c_block, ldc);
}

int64_t BlocksPerTask(const PackedMatrix& w, int64_t m, int64_t tasks, int threads) {
  int64_t blocks = w.precision() == Precision::kBF16 ? Tiles().streams_bf16(m) : 1;
  while (blocks > 1 && tasks / blocks < 2 * threads) blocks /= 2;  // but leave every thread something to do
  return blocks;
}

void MatMul(const PackedMatrix& w, const std::byte* a, int64_t lda, int64_t m, float* c, int64_t ldc,
            ThreadPool& pool) {
  if (m == 0) return;
  const int64_t element = ActivationBytes(w.precision());
  const int64_t block_bytes = kBlockColumns * w.k() * element;
  const int64_t blocks_per_task =
      std::max(BlocksPerTask(w, m, w.blocks(), pool.threads()),
               std::clamp(kTaskWeightBytes / block_bytes, int64_t{1},
                          std::max(int64_t{1}, w.blocks() / (2 * pool.threads()))));
  const int64_t column_tasks = (w.blocks() + blocks_per_task - 1) / blocks_per_task;
  const int64_t row_tasks = (m + kTaskRows - 1) / kTaskRows;
  pool.ParallelFor(column_tasks * row_tasks, [&](int64_t task) {
    const int64_t row = task / column_tasks * kTaskRows;
    const int64_t rows = std::min(kTaskRows, m - row);
    const int64_t begin = task % column_tasks * blocks_per_task;
    MatMulBlocks(w, begin, std::min(blocks_per_task, w.blocks() - begin), a + row * lda * element, lda, rows,
                 c + row * ldc + begin * kBlockColumns, kBlockColumns, ldc);
  });
}

void ToActivation(Precision precision, const float* x, std::byte* out, int64_t n) {
  if (precision == Precision::kExact) {
    std::memcpy(out, x, n * sizeof(float));
  } else {
    Tiles().to_bf16(x, reinterpret_cast<bf16*>(out), n);
  }
}

void FromActivation(Precision precision, const std::byte* x, float* out, int64_t n) {
  if (precision == Precision::kExact) {
    std::memcpy(out, x, n * sizeof(float));
  } else {
    Tiles().to_f32(reinterpret_cast<const bf16*>(x), out, n);
  }
}

}  // namespace minke::kernels
