// Multi-head Latent Attention over a paged latent cache, in its two forms. Source: arXiv 2405.04434,
// section 2.1; docs/mathematics.md.
//
//   absorbed  W_UK is multiplied into the query and W_UV into the output: attention runs over the latent
//   itself,
//             one key of width kv_lora_rank + rope for all heads. For decode and short chunks.
//   naive     keys and values are expanded from the latent, page by page, per head. Fewer operations for long
//             chunks, and for shorter ones with little before them (CheaperForm).
//
// Both reduce the keys in blocks of one page (64 tokens), in order, with a running maximum (the absorbed form
// in partitions of 16 pages, merged in order), so a row's result does not depend on the chunk it arrives in,
// nor on threads or neighbours.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/model/checkpoint.h"

namespace minke::kernels {

// Tokens of one cache page.
inline constexpr int64_t kPageTokens = 64;

struct MlaShape {
  int64_t heads = 0;
  int64_t nope_dim = 0;  // per head, without position
  int64_t rope_dim = 0;  // per head, rotated
  int64_t v_dim = 0;     // per head
  int64_t kv_lora_rank = 0;
  float softmax_scale = 0;

  explicit MlaShape(const ModelConfig& config);
  int64_t q_dim() const { return nope_dim + rope_dim; }
  int64_t latent_dim() const { return kv_lora_rank + rope_dim; }
};

// kv_b_proj split per head and packed for both forms; every head begins at a block of 64 columns.
class MlaWeights {
 public:
  // kv_b_proj of share.of times shape.heads heads; this share of them.
  static absl::StatusOr<MlaWeights> Load(const Checkpoint& checkpoint, const std::string& kv_b_name,
                                         const MlaShape& shape, Precision precision, ThreadPool& pool,
                                         Share share = {});
  // kv_b: [heads * (nope + v), kv_lora_rank].
  static MlaWeights Pack(const MlaShape& shape, Precision precision, ElementReader kv_b, ThreadPool& pool);
  const PackedMatrix& absorb_k() const {
    return absorb_k_;
  }  // per head [kv_lora_rank, nope]: q_nope -> latent
  const PackedMatrix& expand_k() const {
    return expand_k_;
  }  // per head [nope, kv_lora_rank]: latent -> k_nope
  const PackedMatrix& expand_v() const { return expand_v_; }  // per head [v, kv_lora_rank]: latent -> v

 private:
  PackedMatrix absorb_k_, expand_k_, expand_v_;
};

enum class MlaForm { kAbsorbed, kNaive };

// New rows of one sequence. Their latents are already in the cache.
struct MlaChunk {
  int64_t row_begin = 0;  // first row in q and out
  int64_t rows = 0;
  int64_t position_begin = 0;       // position of the first row; rows attend to positions 0 ... their own
  std::span<const uint32_t> pages;  // of the sequence, in order; enough for position_begin + rows tokens
  MlaForm form = MlaForm::kAbsorbed;
};

// The form with fewer operations for `rows` rows after `position_begin` cached ones.
MlaForm CheaperForm(const MlaShape& shape, int64_t rows, int64_t position_begin);

struct MlaScratch {
  Scratch<std::byte> q_act;  // q in the activation dtype
  Scratch<std::byte> query;  // with W_UK multiplied in
  Scratch<float> state;      // sums over pages, before W_UV
};

// q [rows, heads, nope + rope] f32, rotated; out [rows, heads, v] Act.
// cache: one layer's pages, page p at cache + p * kPageTokens * latent_dim Act elements, rows [64,
// latent_dim]: normed c_kv, then rotated k_rope.
void MlaAttention(const MlaShape& shape, const MlaWeights& weights, Precision precision,
                  std::span<const MlaChunk> chunks, const float* q, int64_t total_rows,
                  const std::byte* cache, std::byte* out, MlaScratch& scratch, ThreadPool& pool);

}  // namespace minke::kernels
