#include "libs/kernels/cpu/mla.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "libs/base/status.h"

namespace minke::kernels {
namespace {

constexpr int64_t kTileRowsMax = 64;  // query rows (token, head) that share one pass over the pages

int64_t HeadBlocks(int64_t width) { return (width + kBlockColumns - 1) / kBlockColumns; }

// c [m, width] = a x (head's rows of w)^T, where each head takes HeadBlocks(width) blocks of w.
void HeadMatMul(const PackedMatrix& w, int64_t head, int64_t width, const std::byte* a, int64_t lda,
                int64_t m, float* c, int64_t ldc) {
  const TileKernels& tiles = Tiles();
  const int64_t blocks = HeadBlocks(width);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = std::min(kBlockColumns, width - b * kBlockColumns), block = head * blocks + b;
    float* out = c + b * kBlockColumns;
    if (w.precision() == Precision::kExact) {
      tiles.gemm_f32(w.block_f32(block), kBlockColumns, reinterpret_cast<const float*>(a), lda, out, ldc, m,
                     n, w.k(), false);
    } else {
      tiles.gemm_bf16(w.block_bf16(block), reinterpret_cast<const bf16*>(a), lda, out, ldc, m, n, w.k(),
                      false);
    }
  }
}

// ---- one page of keys and values, in the layout of the products
// -----------------------------------------------

// Exact: the rows, and their transpose. BF16: key pairs run along the width, value pairs along the keys, so
// that both products take bf16 operands and accumulate in f32.
struct PageScratch {
  Scratch<std::byte> padded, keys, values, probabilities;
};

int64_t Even(int64_t n) { return n + n % 2; }

// keys [n <= 64, width] Act, row stride ldk, to the form ScoreProduct takes.
const std::byte* PackKeys(Precision precision, const std::byte* keys, int64_t ldk, int64_t n, int64_t width,
                          PageScratch& scratch) {
  auto* out =
      reinterpret_cast<float*>(scratch.keys.Resize(Even(width) * kPageTokens * ActivationBytes(precision)));
  if (precision == Precision::kExact) {
    Tiles().transpose_64(reinterpret_cast<const float*>(keys), ldk, n, width, out);
    return scratch.keys.data();
  }
  // Two bf16 of a row move as one 32-bit value.
  if (ldk % 2 != 0 || width % 2 != 0) {
    auto* padded = reinterpret_cast<bf16*>(scratch.padded.Resize(kPageTokens * Even(width) * sizeof(bf16)));
    for (int64_t i = 0; i < n; ++i) {
      padded[i * Even(width) + Even(width) - 1] = 0;
      std::memcpy(padded + i * Even(width), keys + i * ldk * sizeof(bf16), width * sizeof(bf16));
    }
    keys = scratch.padded.data();
    ldk = Even(width);
  }
  Tiles().transpose_64(reinterpret_cast<const float*>(keys), ldk / 2, n, Even(width) / 2, out);
  return scratch.keys.data();
}

// scores [m, 64] = query [m, width] Act x keys^T.
void ScoreProduct(Precision precision, const std::byte* packed_keys, const std::byte* query, int64_t ldq,
                  int64_t m, int64_t width, float* scores) {
  if (precision == Precision::kExact) {
    Tiles().gemm_f32(reinterpret_cast<const float*>(packed_keys), kPageTokens,
                     reinterpret_cast<const float*>(query), ldq, scores, kPageTokens, m, kPageTokens, width,
                     false);
  } else {
    Tiles().gemm_bf16(reinterpret_cast<const bf16*>(packed_keys), reinterpret_cast<const bf16*>(query), ldq,
                      scores, kPageTokens, m, kPageTokens, width, false);
  }
}

// values [n <= 64, width] Act, row stride ldv, to the form ValueProduct takes. Exact: as they are.
const std::byte* PackValues(Precision precision, const std::byte* values, int64_t ldv, int64_t n,
                            int64_t width, PageScratch& scratch) {
  if (precision == Precision::kExact) return values;
  constexpr int64_t kBlock = kPageTokens * kBlockColumns;
  auto* out = reinterpret_cast<bf16*>(scratch.values.Resize(HeadBlocks(width) * kBlock * sizeof(bf16)));
  for (int64_t j = 0; j < width; j += kBlockColumns) {
    Tiles().pair_rows(reinterpret_cast<const bf16*>(values) + j, ldv, n, std::min(kBlockColumns, width - j),
                      out + j / kBlockColumns * kBlock);
  }
  return scratch.values.data();
}

// out [m, n] (+)= p [m, keys] x values [keys, n]. Exact: values row-major with stride ldv and 64 readable
// columns past n.
void ValueProduct(Precision precision, const float* p, const std::byte* values, int64_t ldv, int64_t m,
                  int64_t n, int64_t keys, float* out, int64_t ldo, PageScratch& scratch) {
  const bf16* rounded = nullptr;
  if (precision == Precision::kBF16) {
    auto* to = reinterpret_cast<bf16*>(scratch.probabilities.Resize(m * kPageTokens * sizeof(bf16)));
    Tiles().to_bf16(p, to, m * kPageTokens);
    rounded = to;
  }
  for (int64_t j = 0; j < n; j += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, n - j);
    if (precision == Precision::kExact) {
      Tiles().gemm_f32(reinterpret_cast<const float*>(values) + j, ldv, p, kPageTokens, out + j, ldo, m,
                       columns, keys, true);
    } else {
      Tiles().gemm_bf16(reinterpret_cast<const bf16*>(values) + j * kPageTokens, rounded, kPageTokens,
                        out + j, ldo, m, columns, keys, true);
    }
  }
}

// Memory of one work item; per thread, grows only.
struct ThreadScratch {
  Scratch<float> query, scores, keys, values, out, maximum, sum;
  Scratch<std::byte> act, rows, query_act;
  PageScratch page;
};
ThreadScratch& LocalScratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

// One page's scores of one query row, 64 wide, become probabilities against the row's running maximum; `out`
// is rescaled to it.
void SoftmaxStep(float* scores, int64_t valid, float softmax_scale, float& maximum, float& sum, float* out,
                 int64_t out_dim) {
  const TileKernels& tiles = Tiles();
  if (valid <= 0) {
    std::fill(scores, scores + kPageTokens, 0.0f);
    return;
  }
  tiles.scale(scores, softmax_scale, valid);
  const float page_maximum = tiles.max(scores, valid);
  if (page_maximum > maximum) {
    if (maximum != -INFINITY) {
      float correction = maximum;
      tiles.exp_sum(&correction, page_maximum, 1);
      tiles.scale(out, correction, out_dim);
      sum *= correction;
    }
    maximum = page_maximum;
  }
  sum += tiles.exp_sum(scores, maximum, valid);
  std::fill(scores + valid, scores + kPageTokens, 0.0f);
}

struct Context {
  const MlaShape& shape;
  const MlaWeights& weights;
  Precision precision;
  const float* q;          // [rows, heads, q_dim]
  const std::byte* q_act;  // the same, Act
  const std::byte* cache;
  std::byte* out;  // [rows, heads, v] Act
  int64_t element() const { return ActivationBytes(precision); }
  const std::byte* page(uint32_t index) const {
    return cache + int64_t{index} * kPageTokens * shape.latent_dim() * element();
  }
};

// Rounds o [m, dim] / sum to Act.
const std::byte* Normalised(const Context& context, float* o, const float* sum, int64_t m, int64_t dim,
                            Scratch<std::byte>& act) {
  std::byte* rounded = act.Resize(m * dim * context.element());
  for (int64_t i = 0; i < m; ++i) {
    Tiles().scale(o + i * dim, 1.0f / sum[i], dim);
    ToActivation(context.precision, o + i * dim, rounded + i * dim * context.element(), dim);
  }
  return rounded;
}

// ---- the absorbed form
// --------------------------------------------------------------------------------------------
//
// Keys are reduced page by page inside partitions of kPartitionTokens, and the partitions are merged in
// order: the same arithmetic whether one thread walks them all or several take one each.

constexpr int64_t kPartitionTokens = 16 * kPageTokens;

// Rows of one softmax under way: o [m, rank], not yet divided by sum [m]; maximum [m].
struct Partition {
  float *o, *maximum, *sum;
};

// out [heads * tokens, latent] Act: the queries of rows [row, row + tokens), ordered [head, token], with W_UK
// multiplied in.
void AbsorbQuery(const Context& context, int64_t row, int64_t tokens, int64_t head, int64_t heads,
                 std::byte* out) {
  const MlaShape& s = context.shape;
  const int64_t latent = s.latent_dim(), rank = s.kv_lora_rank, q_stride = s.heads * s.q_dim();
  float* query = LocalScratch().query.Resize(tokens * latent);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t offset = row * q_stride + (head + h) * s.q_dim();
    HeadMatMul(context.weights.absorb_k(), head + h, rank, context.q_act + offset * context.element(),
               q_stride, tokens, query, latent);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(query + t * latent + rank, context.q + offset + t * q_stride + s.nope_dim,
                  s.rope_dim * sizeof(float));
    }
    ToActivation(context.precision, query, out + h * tokens * latent * context.element(), tokens * latent);
  }
}

// Queries [heads, tokens, latent] Act of tokens `token`.. of the chunk, over the keys [key_begin, key_end).
void AttendPages(const Context& context, const MlaChunk& chunk, int64_t token, int64_t tokens, int64_t heads,
                 const std::byte* query, int64_t key_begin, int64_t key_end, const Partition& result) {
  const MlaShape& s = context.shape;
  const Precision precision = context.precision;
  ThreadScratch& scratch = LocalScratch();
  const int64_t m = tokens * heads, latent = s.latent_dim(), rank = s.kv_lora_rank;
  const int64_t first_position = chunk.position_begin + token;
  // A copy where the exact form would read past the cache's end.
  std::byte* rows = scratch.rows.Resize((kPageTokens * latent + kBlockColumns) * context.element());
  float* scores = scratch.scores.Resize(m * kPageTokens);
  std::fill(result.o, result.o + m * rank, 0.0f);
  std::fill(result.maximum, result.maximum + m, -INFINITY);
  std::fill(result.sum, result.sum + m, 0.0f);
  for (int64_t key = key_begin; key < key_end; key += kPageTokens) {
    const int64_t keys = std::min(kPageTokens, key_end - key);
    const std::byte* page = context.page(chunk.pages[key / kPageTokens]);
    if (precision == Precision::kExact)
      page = static_cast<std::byte*>(std::memcpy(rows, page, keys * latent * sizeof(float)));
    const std::byte* packed_keys = PackKeys(precision, page, latent, keys, latent, scratch.page);
    ScoreProduct(precision, packed_keys, query, latent, m, latent, scores);
    for (int64_t i = 0; i < m; ++i) {
      SoftmaxStep(scores + i * kPageTokens, std::min(keys, first_position + i % tokens + 1 - key),
                  s.softmax_scale, result.maximum[i], result.sum[i], result.o + i * rank, rank);
    }
    const std::byte* values = PackValues(precision, page, latent, keys, rank, scratch.page);
    ValueProduct(precision, scores, values, latent, m, rank, keys, result.o, rank, scratch.page);
  }
}

// into (+)= part, rows [0, m).
void MergePartition(const Partition& into, const Partition& part, int64_t m, int64_t rank) {
  const TileKernels& tiles = Tiles();
  for (int64_t i = 0; i < m; ++i) {
    if (part.maximum[i] == -INFINITY) continue;  // keys after this row's position
    const float maximum = std::max(into.maximum[i], part.maximum[i]);
    float scale_into = into.maximum[i], scale_part = part.maximum[i];
    tiles.exp_sum(&scale_into, maximum, 1);
    tiles.exp_sum(&scale_part, maximum, 1);
    tiles.scale(into.o + i * rank, scale_into, rank);
    tiles.add_scaled(into.o + i * rank, part.o + i * rank, scale_part, rank);
    into.sum[i] = into.sum[i] * scale_into + part.sum[i] * scale_part;
    into.maximum[i] = maximum;
  }
}

// out of rows [row, row + tokens): the mean latents o [heads * tokens, rank] / sum, times W_UV.
void ExpandOutput(const Context& context, int64_t row, int64_t tokens, int64_t head, int64_t heads, float* o,
                  const float* sum) {
  const MlaShape& s = context.shape;
  ThreadScratch& scratch = LocalScratch();
  const int64_t rank = s.kv_lora_rank;
  const std::byte* o_act = Normalised(context, o, sum, tokens * heads, rank, scratch.act);
  float* value = scratch.values.Resize(tokens * s.v_dim);
  for (int64_t h = 0; h < heads; ++h) {
    HeadMatMul(context.weights.expand_v(), head + h, s.v_dim, o_act + h * tokens * rank * context.element(),
               rank, tokens, value, s.v_dim);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = ((row + t) * s.heads + head + h) * s.v_dim;
      ToActivation(context.precision, value + t * s.v_dim, context.out + at * context.element(), s.v_dim);
    }
  }
}

// Tokens [token, token + tokens) of a chunk, heads [head, head + heads), from query to output.
void Absorbed(const Context& context, const MlaChunk& chunk, int64_t token, int64_t tokens, int64_t head,
              int64_t heads) {
  const MlaShape& s = context.shape;
  ThreadScratch& scratch = LocalScratch();
  const int64_t m = tokens * heads, rank = s.kv_lora_rank;
  const int64_t row = chunk.row_begin + token, key_end = chunk.position_begin + token + tokens;
  std::byte* query = scratch.query_act.Resize(m * s.latent_dim() * context.element());
  AbsorbQuery(context, row, tokens, head, heads, query);
  float* const o = scratch.out.Resize(2 * m * rank);
  float* const maximum = scratch.maximum.Resize(2 * m);
  float* const sum = scratch.sum.Resize(2 * m);
  const Partition all{o, maximum, sum}, next{o + m * rank, maximum + m, sum + m};
  for (int64_t begin = 0; begin < key_end; begin += kPartitionTokens) {
    const Partition& into = begin == 0 ? all : next;
    AttendPages(context, chunk, token, tokens, heads, query, begin,
                std::min(begin + kPartitionTokens, key_end), into);
    if (begin > 0) MergePartition(all, next, m, rank);
  }
  ExpandOutput(context, row, tokens, head, heads, o, sum);
}

// A few sequences with long contexts cannot keep all threads busy one item each, and splitting heads would
// make every thread lay out every page. Such chunks go through three loops instead: queries, partitions,
// outputs.
constexpr int64_t kSplitRowsMax = 4;  // decode, and speculative decoding
constexpr int64_t kSplitHeads = 4;    // of one task of the first and last loop

struct SplitChunk {
  const MlaChunk* chunk;
  int64_t partitions;
  std::byte* query;  // [heads, rows, latent] Act
  float* state;      // per partition: o [heads * rows, rank], then maximum and sum [heads * rows]
  int64_t m(const MlaShape& s) const { return s.heads * chunk->rows; }
  Partition partition(const MlaShape& s, int64_t index, int64_t first_row) const {
    float* begin = state + index * m(s) * (s.kv_lora_rank + 2);
    float* maximum = begin + m(s) * s.kv_lora_rank;
    return {begin + first_row * s.kv_lora_rank, maximum + first_row, maximum + m(s) + first_row};
  }
};

void AbsorbSplit(const Context& context, const SplitChunk& split, int64_t head) {
  const MlaShape& s = context.shape;
  AbsorbQuery(context, split.chunk->row_begin, split.chunk->rows, head, std::min(kSplitHeads, s.heads - head),
              split.query + head * split.chunk->rows * s.latent_dim() * context.element());
}

void AttendSplit(const Context& context, const SplitChunk& split, int64_t head, int64_t heads,
                 int64_t index) {
  const MlaShape& s = context.shape;
  const MlaChunk& chunk = *split.chunk;
  const int64_t begin = index * kPartitionTokens, first = head * chunk.rows;
  AttendPages(context, chunk, 0, chunk.rows, heads, split.query + first * s.latent_dim() * context.element(),
              begin, std::min(begin + kPartitionTokens, chunk.position_begin + chunk.rows),
              split.partition(s, index, first));
}

void FinishSplit(const Context& context, const SplitChunk& split, int64_t head) {
  const MlaShape& s = context.shape;
  const int64_t heads = std::min(kSplitHeads, s.heads - head), tokens = split.chunk->rows,
                first = head * tokens;
  const Partition all = split.partition(s, 0, first);
  for (int64_t i = 1; i < split.partitions; ++i) {
    MergePartition(all, split.partition(s, i, first), heads * tokens, s.kv_lora_rank);
  }
  ExpandOutput(context, split.chunk->row_begin, tokens, head, heads, all.o, all.sum);
}

// A whole chunk, one head.
void Naive(const Context& context, const MlaChunk& chunk, int64_t head) {
  const MlaShape& s = context.shape;
  ThreadScratch& scratch = LocalScratch();
  const int64_t m = chunk.rows, latent = s.latent_dim(), rank = s.kv_lora_rank, q_dim = s.q_dim(),
                v_dim = s.v_dim;
  const int64_t q_stride = s.heads * q_dim;
  const Precision precision = context.precision;
  const std::byte* query = context.q_act + (chunk.row_begin * q_stride + head * q_dim) * context.element();
  float* keys_rows = scratch.keys.Resize(kPageTokens * q_dim);
  std::byte* act_rows = scratch.rows.Resize(kPageTokens * std::max(q_dim, v_dim) * context.element());
  float* values = scratch.values.Resize(kPageTokens * v_dim + kBlockColumns);
  float* scores = scratch.scores.Resize(kTileRowsMax * kPageTokens);
  float* o = scratch.out.Resize(m * v_dim);
  float* maximum = scratch.maximum.Resize(m);
  float* sum = scratch.sum.Resize(m);
  std::fill(o, o + m * v_dim, 0.0f);
  std::fill(maximum, maximum + m, -INFINITY);
  std::fill(sum, sum + m, 0.0f);
  const int64_t keys_end = chunk.position_begin + m;
  for (int64_t key = 0; key < keys_end; key += kPageTokens) {
    const int64_t keys = std::min(kPageTokens, keys_end - key);
    const std::byte* page = context.page(chunk.pages[key / kPageTokens]);
    HeadMatMul(context.weights.expand_k(), head, s.nope_dim, page, latent, keys, keys_rows, q_dim);
    HeadMatMul(context.weights.expand_v(), head, v_dim, page, latent, keys, values, v_dim);
    for (int64_t i = 0; i < keys; ++i) {
      ToActivation(precision, keys_rows + i * q_dim, act_rows + i * q_dim * context.element(), s.nope_dim);
      std::memcpy(act_rows + (i * q_dim + s.nope_dim) * context.element(),
                  page + (i * latent + rank) * context.element(), s.rope_dim * context.element());
    }
    const std::byte* packed_keys = PackKeys(precision, act_rows, q_dim, keys, q_dim, scratch.page);
    const std::byte* packed_values = reinterpret_cast<const std::byte*>(values);
    if (precision == Precision::kBF16) {
      ToActivation(precision, values, act_rows, keys * v_dim);
      packed_values = PackValues(precision, act_rows, v_dim, keys, v_dim, scratch.page);
    }
    // Rows before this page's first key attend to nothing in it.
    for (int64_t t0 = std::max<int64_t>(0, key - chunk.position_begin); t0 < m; t0 += kTileRowsMax) {
      const int64_t tile = std::min(kTileRowsMax, m - t0);
      ScoreProduct(precision, packed_keys, query + t0 * q_stride * context.element(), q_stride, tile, q_dim,
                   scores);
      for (int64_t i = 0; i < tile; ++i) {
        SoftmaxStep(scores + i * kPageTokens, std::min(keys, chunk.position_begin + t0 + i + 1 - key),
                    s.softmax_scale, maximum[t0 + i], sum[t0 + i], o + (t0 + i) * v_dim, v_dim);
      }
      ValueProduct(precision, scores, packed_values, v_dim, tile, v_dim, keys, o + t0 * v_dim, v_dim,
                   scratch.page);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    Tiles().scale(o + i * v_dim, 1.0f / sum[i], v_dim);
    ToActivation(context.precision, o + i * v_dim,
                 context.out + ((chunk.row_begin + i) * s.heads + head) * v_dim * context.element(), v_dim);
  }
}

// Tokens `token`.. of chunk `chunk`, heads `head`..; naive items take a whole chunk. Of a split chunk (index
// `split`): its partition.
struct Item {
  int32_t chunk;
  int64_t token, tokens, head, heads;
  int32_t split = -1;
  int64_t partition = 0;
};

}  // namespace

MlaShape::MlaShape(const ModelConfig& config)
    : heads(config.num_attention_heads),
      nope_dim(config.qk_nope_head_dim),
      rope_dim(config.qk_rope_head_dim),
      v_dim(config.v_head_dim),
      kv_lora_rank(config.kv_lora_rank),
      softmax_scale(static_cast<float>(config.softmax_scale())) {}

absl::StatusOr<MlaWeights> MlaWeights::Load(const Checkpoint& checkpoint, const std::string& kv_b_name,
                                            const MlaShape& s, Precision precision, ThreadPool& pool) {
  const int64_t shape[] = {s.heads * (s.nope_dim + s.v_dim), s.kv_lora_rank};
  MK_ASSIGN_OR_RETURN(const TensorView kv_b, checkpoint.Find(kv_b_name, shape));
  const int64_t rank = s.kv_lora_rank, head_rows = s.nope_dim + s.v_dim;
  // One matrix for all heads: head h in rows [h * padded, h * padded + width), the rest of its blocks zero.
  const auto pack = [&](int64_t width, int64_t k, auto read) {
    const int64_t padded = HeadBlocks(width) * kBlockColumns;
    return PackedMatrix::Pack(
        precision, s.heads * padded, k,
        [&](int64_t row, std::span<float> out) {
          if (row % padded < width) {
            read(row / padded, row % padded, out);
          } else {
            std::fill(out.begin(), out.end(), 0.0f);
          }
        },
        pool);
  };
  MlaWeights weights;
  weights.absorb_k_ = pack(rank, s.nope_dim, [&](int64_t head, int64_t column, std::span<float> out) {
    for (int64_t i = 0; i < s.nope_dim; ++i)
      kv_b.Read((head * head_rows + i) * rank + column, out.subspan(i, 1));
  });
  weights.expand_k_ = pack(s.nope_dim, rank, [&](int64_t head, int64_t i, std::span<float> out) {
    kv_b.Read((head * head_rows + i) * rank, out);
  });
  weights.expand_v_ = pack(s.v_dim, rank, [&](int64_t head, int64_t i, std::span<float> out) {
    kv_b.Read((head * head_rows + s.nope_dim + i) * rank, out);
  });
  checkpoint.Release(kv_b);
  return weights;
}

void MlaAttention(const MlaShape& shape, const MlaWeights& weights, Precision precision,
                  std::span<const MlaChunk> chunks, const float* q, int64_t total_rows,
                  const std::byte* cache, std::byte* out, MlaScratch& scratch, ThreadPool& pool) {
  if (total_rows == 0) return;
  const int64_t q_elements = total_rows * shape.heads * shape.q_dim();
  const std::byte* q_act = reinterpret_cast<const std::byte*>(q);
  if (precision == Precision::kBF16) {
    std::byte* rounded = scratch.q_act.Resize(q_elements * ActivationBytes(precision));
    ToActivation(precision, q, rounded, q_elements);
    q_act = rounded;
  }
  const Context context{shape, weights, precision, q, q_act, cache, out};
  static thread_local std::vector<Item> items;
  static thread_local std::vector<SplitChunk> splits;
  items.clear();
  splits.clear();
  const auto is_split = [&](const MlaChunk& chunk) {
    return chunk.form == MlaForm::kAbsorbed && std::ssize(chunks) < 2 * pool.threads() &&
           chunk.rows <= kSplitRowsMax && chunk.position_begin + chunk.rows > kPartitionTokens;
  };
  int64_t query_rows = 0, state_rows = 0;
  for (const MlaChunk& chunk : chunks) {
    if (!is_split(chunk)) continue;
    const int64_t partitions = (chunk.position_begin + chunk.rows + kPartitionTokens - 1) / kPartitionTokens;
    splits.push_back({&chunk, partitions, nullptr, nullptr});
    query_rows += shape.heads * chunk.rows;
    state_rows += shape.heads * chunk.rows * partitions;
  }
  std::byte* split_query = scratch.split_query.Resize(query_rows * shape.latent_dim() * context.element());
  float* split_state = scratch.split_state.Resize(state_rows * (shape.kv_lora_rank + 2));
  for (SplitChunk& split : splits) {
    split.query = split_query;
    split.state = split_state;
    split_query += split.m(shape) * shape.latent_dim() * context.element();
    split_state += split.m(shape) * split.partitions * (shape.kv_lora_rank + 2);
  }
  // Enough items for every thread: heads are split when there are few sequences.
  const int64_t head_splits =
      std::clamp<int64_t>((pool.threads() + std::ssize(chunks) - 1) / std::ssize(chunks), 1, shape.heads);
  const int64_t heads = (shape.heads + head_splits - 1) / head_splits;
  const int64_t tile_tokens = std::max<int64_t>(1, kTileRowsMax / heads);
  for (int32_t c = 0, next_split = 0; c < std::ssize(chunks); ++c) {
    if (is_split(chunks[c])) {
      const int64_t group = std::max<int64_t>(1, kTileRowsMax / chunks[c].rows);
      for (int64_t partition = 0; partition < splits[next_split].partitions; ++partition) {
        for (int64_t head = 0; head < shape.heads; head += group) {
          items.push_back(
              {c, 0, chunks[c].rows, head, std::min(group, shape.heads - head), next_split, partition});
        }
      }
      ++next_split;
      continue;
    }
    if (chunks[c].form == MlaForm::kNaive) {
      for (int64_t head = 0; head < shape.heads; ++head) items.push_back({c, 0, chunks[c].rows, head, 1});
      continue;
    }
    for (int64_t token = 0; token < chunks[c].rows; token += tile_tokens) {
      for (int64_t head = 0; head < shape.heads; head += heads) {
        items.push_back({c, token, std::min(tile_tokens, chunks[c].rows - token), head,
                         std::min(heads, shape.heads - head)});
      }
    }
  }
  const Item* const item_data = items.data();  // thread_local: workers must not look them up themselves
  const SplitChunk* const split_data = splits.data();
  const int64_t head_tasks = (shape.heads + kSplitHeads - 1) / kSplitHeads,
                split_tasks = std::ssize(splits) * head_tasks;
  pool.ParallelFor(split_tasks, [&](int64_t i) {
    AbsorbSplit(context, split_data[i / head_tasks], i % head_tasks * kSplitHeads);
  });
  pool.ParallelFor(std::ssize(items), [&](int64_t i) {
    const Item& item = item_data[i];
    if (item.split >= 0) {
      AttendSplit(context, split_data[item.split], item.head, item.heads, item.partition);
    } else if (chunks[item.chunk].form == MlaForm::kNaive) {
      Naive(context, chunks[item.chunk], item.head);
    } else {
      Absorbed(context, chunks[item.chunk], item.token, item.tokens, item.head, item.heads);
    }
  });
  pool.ParallelFor(split_tasks, [&](int64_t i) {
    FinishSplit(context, split_data[i / head_tasks], i % head_tasks * kSplitHeads);
  });
}

}  // namespace minke::kernels
