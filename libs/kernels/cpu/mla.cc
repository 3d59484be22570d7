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
  const int64_t blocks = HeadBlocks(width), first = head * blocks;
  int64_t b = 0;
  // Few rows read a head's blocks in streams, as MatMulBlocks does.
  if (w.precision() == Precision::kBF16 && width / kBlockColumns > 1 && tiles.streams_bf16(m) > 1) {
    b = width / kBlockColumns;
    tiles.gemm_streams_bf16(w.block_bf16(first), w.block_bf16(first + 1) - w.block_bf16(first), b,
                            reinterpret_cast<const bf16*>(a), lda, c, kBlockColumns, ldc, m, w.k());
  }
  for (; b < blocks; ++b) {
    const int64_t n = std::min(kBlockColumns, width - b * kBlockColumns), block = first + b;
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
  Scratch<std::byte> padded, keys, values, probabilities, queries;
  Scratch<float> by_key;
};

int64_t Even(int64_t n) { return n + n % 2; }

int64_t PackedKeysBytes(Precision precision, int64_t width) {
  return Even(width) * kPageTokens * ActivationBytes(precision);
}

// keys [n <= 64, width] Act, row stride ldk, as the packed operand of a product with 64 columns.
void PackKeys(Precision precision, const std::byte* keys, int64_t ldk, int64_t n, int64_t width,
              std::byte* packed, PageScratch& scratch) {
  auto* out = reinterpret_cast<float*>(packed);
  if (precision == Precision::kExact) {
    return Tiles().transpose_64(reinterpret_cast<const float*>(keys), ldk, n, width, out);
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

// The same with the queries packed, in blocks of 64 rows, and a page's keys read where they are: a page meets
// few queries when sequences decode, and laying out its keys would cost more than the product.
// `next`: the page whose turn it is then; null: none.
void ScorePage(const std::byte* packed_queries, const std::byte* page, int64_t keys, const std::byte* next,
               int64_t m, int64_t width, float* scores, PageScratch& scratch) {
  int64_t next_bytes = next == nullptr ? 0 : kPageTokens * width * static_cast<int64_t>(sizeof(bf16));
  float* by_key = scratch.by_key.Resize(kPageTokens * kPageTokens);
  for (int64_t i = 0; i < m; i += kPageTokens) {
    const int64_t rows = std::min(kPageTokens, m - i);
    Tiles().gemm_bf16_ahead(reinterpret_cast<const bf16*>(
                                packed_queries + i / kPageTokens * PackedKeysBytes(Precision::kBF16, width)),
                            reinterpret_cast<const bf16*>(page), width, by_key, kPageTokens, keys, rows,
                            width, false, next, next_bytes);
    next_bytes = 0;
    Tiles().transpose_64(by_key, kPageTokens, keys, rows, scores + i * kPageTokens);
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
  Scratch<std::byte> act, rows;
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

// Queries [heads, tokens, latent] Act of tokens `token`.. of the chunk, over the keys [key_begin, key_end).
void AttendPages(const Context& context, const MlaChunk& chunk, int64_t token, int64_t tokens, int64_t heads,
                 const std::byte* query, int64_t key_begin, int64_t key_end, const Partition& result) {
  const MlaShape& s = context.shape;
  const Precision precision = context.precision;
  ThreadScratch& scratch = LocalScratch();
  const int64_t m = tokens * heads, latent = s.latent_dim(), rank = s.kv_lora_rank;
  const int64_t first_position = chunk.position_begin + token;
  float* scores = scratch.scores.Resize(m * kPageTokens);
  std::fill(result.o, result.o + m * rank, 0.0f);
  std::fill(result.maximum, result.maximum + m, -INFINITY);
  std::fill(result.sum, result.sum + m, 0.0f);
  const int64_t packed_bytes = PackedKeysBytes(precision, latent);
  std::byte *rows = nullptr, *packed_keys = nullptr, *packed_queries = nullptr;
  if (precision == Precision::kExact) {
    // A copy, since the products would read past the cache's end.
    rows = scratch.rows.Resize((kPageTokens * latent + kBlockColumns) * context.element());
    packed_keys = scratch.page.keys.Resize(packed_bytes);
  } else {
    packed_queries = scratch.page.queries.Resize((m + kPageTokens - 1) / kPageTokens * packed_bytes);
    for (int64_t i = 0; i < m; i += kPageTokens) {
      PackKeys(precision, query + i * latent * context.element(), latent, std::min(kPageTokens, m - i),
               latent, packed_queries + i / kPageTokens * packed_bytes, scratch.page);
    }
  }
  for (int64_t key = key_begin; key < key_end; key += kPageTokens) {
    const int64_t keys = std::min(kPageTokens, key_end - key);
    const std::byte* page = context.page(chunk.pages[key / kPageTokens]);
    if (precision == Precision::kExact) {
      page = static_cast<std::byte*>(std::memcpy(rows, page, keys * latent * sizeof(float)));
      PackKeys(precision, page, latent, keys, latent, packed_keys, scratch.page);
      ScoreProduct(precision, packed_keys, query, latent, m, latent, scores);
    } else {
      const std::byte* next = key + kPageTokens < chunk.position_begin + chunk.rows
                                  ? context.page(chunk.pages[key / kPageTokens + 1])
                                  : nullptr;
      ScorePage(packed_queries, page, keys, next, m, latent, scores, scratch.page);
    }
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

// Tokens of a chunk that go through the pages together.
struct Piece {
  const MlaChunk* chunk;
  int64_t token, tokens;
  int64_t partitions;  // kept apart, for as many tasks; 1: one task walks them all
  std::byte* query;    // [heads, tokens, latent] Act
  float* state;        // per partition: o [heads * tokens, rank], then maximum and sum [heads * tokens]
  int64_t row() const { return chunk->row_begin + token; }
  int64_t key_end() const { return chunk->position_begin + token + tokens; }
  Partition partition(const MlaShape& s, int64_t index, int64_t first_row) const {
    const int64_t m = s.heads * tokens;
    float* begin = state + index * m * (s.kv_lora_rank + 2);
    float* maximum = begin + m * s.kv_lora_rank;
    return {begin + first_row * s.kv_lora_rank, maximum + first_row, maximum + m + first_row};
  }
};

// Pieces whose rows follow each other: their projections by one head's weights are one product.
struct Wave {
  std::span<const Piece> pieces;
  int64_t row_begin, rows;
};

// The queries of a wave, with the head's W_UK multiplied in.
void AbsorbQueries(const Context& context, const Wave& wave, int64_t head) {
  const MlaShape& s = context.shape;
  const int64_t latent = s.latent_dim(), rank = s.kv_lora_rank, q_stride = s.heads * s.q_dim();
  const int64_t offset = wave.row_begin * q_stride + head * s.q_dim();
  float* query = LocalScratch().query.Resize(wave.rows * latent);
  HeadMatMul(context.weights.absorb_k(), head, rank, context.q_act + offset * context.element(), q_stride,
             wave.rows, query, latent);
  const float* rotated = context.q + offset + s.nope_dim;
  for (const Piece& piece : wave.pieces) {
    for (int64_t t = 0; t < piece.tokens; ++t, query += latent, rotated += q_stride) {
      std::memcpy(query + rank, rotated, s.rope_dim * sizeof(float));
      ToActivation(context.precision, query,
                   piece.query + (head * piece.tokens + t) * latent * context.element(), latent);
    }
  }
}

// One partition of a piece, or all of them merged in order.
void Attend(const Context& context, const Piece& piece, int64_t head, int64_t heads, int64_t index) {
  const MlaShape& s = context.shape;
  const int64_t first = head * piece.tokens, m = heads * piece.tokens, key_end = piece.key_end();
  const std::byte* query = piece.query + first * s.latent_dim() * context.element();
  const Partition result = piece.partition(s, index, first);
  const auto attend = [&](int64_t begin, const Partition& into) {
    AttendPages(context, *piece.chunk, piece.token, piece.tokens, heads, query, begin,
                std::min(begin + kPartitionTokens, key_end), into);
  };
  attend(index * kPartitionTokens, result);
  if (piece.partitions > 1 || key_end <= kPartitionTokens) return;
  ThreadScratch& scratch = LocalScratch();
  const Partition next{scratch.out.Resize(m * s.kv_lora_rank), scratch.maximum.Resize(m),
                       scratch.sum.Resize(m)};
  for (int64_t begin = kPartitionTokens; begin < key_end; begin += kPartitionTokens) {
    attend(begin, next);
    MergePartition(result, next, m, s.kv_lora_rank);
  }
}

// out of a wave's rows: the mean latents times the head's W_UV.
void ExpandOutputs(const Context& context, const Wave& wave, int64_t head) {
  const MlaShape& s = context.shape;
  ThreadScratch& scratch = LocalScratch();
  const int64_t rank = s.kv_lora_rank;
  std::byte* means = scratch.act.Resize(wave.rows * rank * context.element());
  std::byte* mean = means;
  for (const Piece& piece : wave.pieces) {
    const Partition all = piece.partition(s, 0, head * piece.tokens);
    for (int64_t i = 1; i < piece.partitions; ++i) {
      MergePartition(all, piece.partition(s, i, head * piece.tokens), piece.tokens, rank);
    }
    for (int64_t t = 0; t < piece.tokens; ++t, mean += rank * context.element()) {
      Tiles().scale(all.o + t * rank, 1.0f / all.sum[t], rank);
      ToActivation(context.precision, all.o + t * rank, mean, rank);
    }
  }
  float* value = scratch.values.Resize(wave.rows * s.v_dim);
  HeadMatMul(context.weights.expand_v(), head, s.v_dim, means, rank, wave.rows, value, s.v_dim);
  for (int64_t i = 0; i < wave.rows; ++i) {
    const int64_t at = ((wave.row_begin + i) * s.heads + head) * s.v_dim;
    ToActivation(context.precision, value + i * s.v_dim, context.out + at * context.element(), s.v_dim);
  }
}

// ---- the naive form
// -----------------------------------------------------------------------------------------------

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
    std::byte* packed_keys = scratch.page.keys.Resize(PackedKeysBytes(precision, q_dim));
    PackKeys(precision, act_rows, q_dim, keys, q_dim, packed_keys, scratch.page);
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

// Rows of one product with a head's weights, which stay in the L2 cache beside them.
constexpr int64_t kWaveRows = 96;
// Queries and sums of pieces under way: what a shared L3 cache holds.
constexpr int64_t kPassBytes = 16 << 20;

// A task of the middle loop: heads of an absorbed piece, or one head of a naive chunk.
struct Item {
  const Piece* piece;
  const MlaChunk* naive;
  int64_t head, heads, partition;
};

// Memory of the calling thread's plans: grows only.
struct Plan {
  std::vector<Piece> pieces;
  std::vector<Wave> waves;
  std::vector<Item> items;
};

// Pieces of the absorbed chunks; partitions are kept apart where there are too few pieces to keep all threads
// busy, since splitting heads makes every thread lay out every page.
void PlanPieces(const MlaShape& s, std::span<const MlaChunk> chunks, int threads,
                std::vector<Piece>& pieces) {
  const int64_t tile_tokens = std::max<int64_t>(1, kTileRowsMax / s.heads);
  pieces.clear();
  for (const MlaChunk& chunk : chunks) {
    if (chunk.form != MlaForm::kAbsorbed) continue;
    for (int64_t token = 0; token < chunk.rows; token += tile_tokens) {
      pieces.push_back({&chunk, token, std::min(tile_tokens, chunk.rows - token), 1, nullptr, nullptr});
    }
  }
  if (std::ssize(pieces) >= 2 * threads) return;
  for (Piece& piece : pieces) piece.partitions = (piece.key_end() + kPartitionTokens - 1) / kPartitionTokens;
}

// Places the memory of pieces `first`.. and makes waves of them; returns the end of those that fit a pass.
size_t PlanPass(const MlaShape& s, int64_t element, std::vector<Piece>& pieces, size_t first,
                std::vector<Wave>& waves, MlaScratch& scratch) {
  const auto query_bytes = [&](const Piece& p) { return s.heads * p.tokens * s.latent_dim() * element; };
  const auto state_floats = [&](const Piece& p) {
    return p.partitions * s.heads * p.tokens * (s.kv_lora_rank + 2);
  };
  size_t end = first;
  int64_t queries = 0, states = 0;
  do {
    queries += query_bytes(pieces[end]);
    states += state_floats(pieces[end]);
    ++end;
  } while (end < pieces.size() &&
           queries + query_bytes(pieces[end]) +
                   (states + state_floats(pieces[end])) * static_cast<int64_t>(sizeof(float)) <=
               kPassBytes);
  std::byte* query = scratch.query.Resize(queries);
  float* state = scratch.state.Resize(states);
  waves.clear();
  for (size_t i = first; i < end; ++i) {
    Piece& piece = pieces[i];
    piece.query = query;
    piece.state = state;
    query += query_bytes(piece);
    state += state_floats(piece);
    if (!waves.empty()) {
      Wave& wave = waves.back();
      if (wave.row_begin + wave.rows == piece.row() && wave.rows + piece.tokens <= kWaveRows) {
        wave.pieces = {wave.pieces.data(), wave.pieces.size() + 1};
        wave.rows += piece.tokens;
        continue;
      }
    }
    waves.push_back({{&piece, 1}, piece.row(), piece.tokens});
  }
  return end;
}

// Items of the pieces; heads are split where there are fewer than threads.
void PlanItems(const MlaShape& s, std::span<const Piece> pieces, int threads, std::vector<Item>& items) {
  int64_t tasks = 0;
  for (const Piece& piece : pieces) tasks += piece.partitions;
  const int64_t splits = std::clamp<int64_t>((threads + tasks - 1) / tasks, 1, s.heads);
  const int64_t heads = (s.heads + splits - 1) / splits;
  for (const Piece& piece : pieces) {
    for (int64_t partition = 0; partition < piece.partitions; ++partition) {
      for (int64_t head = 0; head < s.heads; head += heads) {
        items.push_back({&piece, nullptr, head, std::min(heads, s.heads - head), partition});
      }
    }
  }
}

}  // namespace

MlaShape::MlaShape(const ModelConfig& config)
    : heads(config.num_attention_heads),
      nope_dim(config.qk_nope_head_dim),
      rope_dim(config.qk_rope_head_dim),
      v_dim(config.v_head_dim),
      kv_lora_rank(config.kv_lora_rank),
      softmax_scale(static_cast<float>(config.softmax_scale())) {}

MlaForm CheaperForm(const MlaShape& s, int64_t rows, int64_t position_begin) {
  // Fewer rows than this leave the naive form's products without enough of them per page and head.
  constexpr int64_t kNaiveRowsMin = 16;
  const int64_t keys = position_begin + rows, pairs = rows * position_begin + rows * (rows + 1) / 2;
  const int64_t per_projection = (s.nope_dim + s.v_dim) * s.kv_lora_rank;  // of a row, or of a key
  const int64_t absorbed = rows * per_projection + pairs * (s.latent_dim() + s.kv_lora_rank);
  const int64_t naive = keys * per_projection + pairs * (s.q_dim() + s.v_dim);
  return rows >= kNaiveRowsMin && naive < absorbed ? MlaForm::kNaive : MlaForm::kAbsorbed;
}

absl::StatusOr<MlaWeights> MlaWeights::Load(const Checkpoint& checkpoint, const std::string& kv_b_name,
                                            const MlaShape& s, Precision precision, ThreadPool& pool,
                                            Share share) {
  const int64_t rows = s.heads * (s.nope_dim + s.v_dim), first = share.index * rows * s.kv_lora_rank;
  const int64_t shape[] = {share.of * rows, s.kv_lora_rank};
  MK_ASSIGN_OR_RETURN(const TensorView kv_b, checkpoint.Find(kv_b_name, shape));
  MlaWeights weights = Pack(
      s, precision, [&](int64_t begin, std::span<float> out) { kv_b.Read(first + begin, out); }, pool);
  checkpoint.Release(kv_b);
  return weights;
}

MlaWeights MlaWeights::Pack(const MlaShape& s, Precision precision, ElementReader kv_b, ThreadPool& pool) {
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
    for (int64_t i = 0; i < s.nope_dim; ++i) kv_b((head * head_rows + i) * rank + column, out.subspan(i, 1));
  });
  weights.expand_k_ = pack(s.nope_dim, rank, [&](int64_t head, int64_t i, std::span<float> out) {
    kv_b((head * head_rows + i) * rank, out);
  });
  weights.expand_v_ = pack(s.v_dim, rank, [&](int64_t head, int64_t i, std::span<float> out) {
    kv_b((head * head_rows + s.nope_dim + i) * rank, out);
  });
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
  static thread_local Plan local_plan;
  Plan& plan = local_plan;  // workers must not look up their own
  PlanPieces(shape, chunks, pool.threads(), plan.pieces);
  plan.items.clear();
  for (const MlaChunk& chunk : chunks) {
    if (chunk.form != MlaForm::kNaive) continue;
    for (int64_t head = 0; head < shape.heads; ++head) plan.items.push_back({nullptr, &chunk, head, 1, 0});
  }
  size_t next = 0;
  do {
    plan.waves.clear();
    if (next < plan.pieces.size()) {
      const size_t first = next;
      next = PlanPass(shape, context.element(), plan.pieces, first, plan.waves, scratch);
      PlanItems(shape, std::span(plan.pieces).subspan(first, next - first), pool.threads(), plan.items);
    }
    const int64_t projections = std::ssize(plan.waves) * shape.heads;
    pool.ParallelFor(projections, [&](int64_t i) {
      AbsorbQueries(context, plan.waves[i / shape.heads], i % shape.heads);
    });
    pool.ParallelFor(std::ssize(plan.items), [&](int64_t i) {
      const Item& item = plan.items[i];
      if (item.piece != nullptr) {
        Attend(context, *item.piece, item.head, item.heads, item.partition);
      } else {
        Naive(context, *item.naive, item.head);
      }
    });
    pool.ParallelFor(projections, [&](int64_t i) {
      ExpandOutputs(context, plan.waves[i / shape.heads], i % shape.heads);
    });
    plan.items.clear();
  } while (next < plan.pieces.size());
}

}  // namespace minke::kernels
