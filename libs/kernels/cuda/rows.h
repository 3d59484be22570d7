// What happens to rows between the matrix products: embedding, norms, rotary embedding, cache rows, SwiGLU,
// sums. Arithmetic is f32, activations bf16, the residual stream f32. Every width is a multiple of 8, every
// pointer 16-byte aligned. All pointers are on the device. Source: docs/mathematics.md.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

// x [rows, hidden] = table[tokens]. A token past the table reads its last row.
absl::Status EmbedRows(const bf16* table, int64_t vocab, const uint32_t* tokens, int64_t rows, int64_t hidden,
                       float* x, const Stream& stream);

// cos_sin [rows, 2 half]: cosines, then sines, times `magnitude`; angles in double (kernels::Rope::Angles).
absl::Status RotaryAngles(const double* inv_freq, double magnitude, int64_t half, const int32_t* positions,
                          int64_t rows, float* cos_sin, const Stream& stream);

// x += add; out = x * rsqrt(mean(x^2) + eps) * weight.
struct NormArgs {
  float* x = nullptr;             // [.., width]
  const bf16* add = nullptr;      // [.., width], or null
  const float* weight = nullptr;  // [width]
  float eps = 0;
  bf16* out = nullptr;  // [rows, width]
  int64_t rows = 0, width = 0;
  const int32_t* select =
      nullptr;  // row i reads x[select[i]] and add[select[i]], and x stays as it is; null: row i
};
absl::Status NormRows(const NormArgs& args, const Stream& stream);

// From a row of the first products to the compressed query and the cache row.
struct LatentArgs {
  const bf16* qkv = nullptr;  // row r at qkv + r * qkv_row: query, then latent, then the key's rotary part
  int64_t qkv_row = 0;
  int32_t q_rank = 0;  // values of the compressed query at the row's begin; 0: the query is not compressed
  const float* q_norm = nullptr;
  bf16* q_compressed = nullptr;  // [rows, q_rank]
  int32_t latent_offset = 0;     // of the latent in the row
  int32_t rank = 0, rope = 0;
  const float* latent_norm = nullptr;
  float eps = 0;
  const float* cos_sin = nullptr;      // [rows, rope]
  bf16* cache = nullptr;               // [pages, 64, rank + rope]: normed latent, rotated key
  const uint32_t* pages = nullptr;     // [rows], where the row's token goes,
  const int32_t* positions = nullptr;  // [rows], slot position % 64
};

// Rotates the rotary part of the queries.
struct QueryArgs {
  const bf16* q = nullptr;  // row r at q + r * q_row: [heads, nope + rope]
  int64_t q_row = 0;
  int32_t heads = 0, nope = 0, rope = 0;
  const float* cos_sin = nullptr;  // [rows, rope]
  bf16* rotated = nullptr;         // row r, head h at rotated + r * rotated_row + h * rotated_head
  int64_t rotated_row = 0, rotated_head = 0;
  bf16* nope_copy =
      nullptr;  // the other part copied to the same row and head strides from here; null: not copied
};

// Both at once, for rows [0, rows); either may be null.
absl::Status LatentAndQueryRows(const LatentArgs* latent, const QueryArgs* query, int64_t rows,
                                const Stream& stream);

// out [keys of all sequences, width] = the sequences' first keys[s] cache rows, in order.
struct GatherArgs {
  const bf16* cache = nullptr;  // [pages, 64, width]
  int64_t width = 0;
  const uint32_t* page_table = nullptr;  // [sequences, stride]
  int64_t stride = 0;
  const int32_t* keys = nullptr;       // [sequences]
  const int32_t* key_begin = nullptr;  // [sequences], row of out
  int64_t sequences = 0;
  int64_t pages_max = 0;  // of one sequence
  bf16* out = nullptr;
};
absl::Status GatherLatents(const GatherArgs& args, const Stream& stream);

// out [rows, inner] = silu(gate) * up of gate_up [rows, 2 inner]: gate, then up.
absl::Status SwiGluRows(const bf16* gate_up, int64_t rows, int64_t inner, bf16* out, const Stream& stream);

// x[r] += partials[begin[r]] + ... + partials[begin[r + 1] - 1], in that order, in f32.
absl::Status AddPartialRows(float* x, int64_t rows, int64_t width, const int32_t* begin, const bf16* partials,
                            const Stream& stream);
absl::Status AddPartialRows(float* x, int64_t rows, int64_t width, const int32_t* begin,
                            const float* partials, const Stream& stream);

}  // namespace minke::cuda
