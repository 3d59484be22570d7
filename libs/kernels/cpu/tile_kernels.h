// The inner loops that exist once per instruction set. Everything above them (packing, threading, MLA,
// experts) is written once and calls through this table.
//
// Determinism: each output element is one chain of additions over k = 0, 1, 2 ... (on AMX tiles in steps of
// 32, in an order that only k's length decides) from its own accumulator, so it does not depend on how many
// rows or columns are computed beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "libs/base/dtype.h"

namespace minke::kernels {

// Columns of a packed weight block: 4 vectors of 16 f32, the tile that 32 AVX-512 registers hold for 6 rows.
inline constexpr int64_t kBlockColumns = 64;

struct TileKernels {
  const char* name;

  // c[i][j] (+)= sum_k a[i][k] * w[k][j] for i < m, j < n <= 64.
  //   a [m, k] f32, row stride lda; w [k, 64] f32, row stride ldw, all 64 columns readable; c [m, n] f32,
  //   stride ldc
  void (*gemm_f32)(const float* w, int64_t ldw, const float* a, int64_t lda, float* c, int64_t ldc, int64_t m,
                   int64_t n, int64_t k, bool accumulate);
  // The same with bf16 operands and f32 accumulation; w is packed in pairs, [ceil(k / 2), 64, 2].
  void (*gemm_bf16)(const bf16* w, const bf16* a, int64_t lda, float* c, int64_t ldc, int64_t m, int64_t n,
                    int64_t k, bool accumulate);
  // The same, and meanwhile asks for the memory [ahead, ahead + ahead_bytes) to be brought into the cache.
  void (*gemm_bf16_ahead)(const bf16* w, const bf16* a, int64_t lda, float* c, int64_t ldc, int64_t m,
                          int64_t n, int64_t k, bool accumulate, const std::byte* ahead, int64_t ahead_bytes);

  // How many neighbouring blocks of weights m rows should meet in one call of gemm_streams_bf16; 1: as well
  // one by one.
  int64_t (*streams_bf16)(int64_t m);
  // gemm_bf16 of m rows with each of `blocks` blocks of 64 columns, `block` elements apart, of which several
  // are read side by side. The results of block j go to c + j * c_block.
  void (*gemm_streams_bf16)(const bf16* w, int64_t block, int64_t blocks, const bf16* a, int64_t lda,
                            float* c, int64_t c_block, int64_t ldc, int64_t m, int64_t k);

  // out = x * rsqrt(mean(x^2) + eps) * weight, n values, f32.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t n);
  // out = silu(gate) * up.
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
  // x = exp(x - maximum); returns the sum, added up in a fixed order that zeros at the end do not change.
  float (*exp_sum)(float* x, float maximum, int64_t n);
  float (*max)(const float* x, int64_t n);
  // out += scale * x; x *= scale.
  void (*add_scaled)(float* out, const float* x, float scale, int64_t n);
  void (*scale)(float* x, float factor, int64_t n);
  void (*to_bf16)(const float* x, bf16* out, int64_t n);
  void (*to_f32)(const bf16* x, float* out, int64_t n);
  // out [columns, 64] = transpose of x [rows <= 64, columns], row stride ldx; the missing rows become zero
  // columns.
  void (*transpose_64)(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* out);
  // out [ceil(rows / 2), 64, 2]: rows [rows, columns <= 64] as gemm_bf16 wants weights whose k runs over the
  // rows. What is missing becomes zero.
  void (*pair_rows)(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* out);
};

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
// Best first.
inline constexpr Isa kIsas[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

const char* IsaName(Isa isa);
bool IsaSupported(Isa isa);
// REQUIRES: IsaSupported(isa).
const TileKernels& TileKernelsFor(Isa isa);
// The best this CPU has; MINKE_ISA=NAME (IsaName) in the environment lowers it.
const TileKernels& Tiles();

}  // namespace minke::kernels
