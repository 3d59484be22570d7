#include <cstring>

#include "libs/base/strings.h"
#include "libs/kernels/bench/kernel_case.h"
#include "libs/kernels/cpu/mla.h"

namespace minke::kernels::bench {
namespace {

struct Work {
  MlaForm form;
  int64_t heads, sequences, rows, depth;  // `rows` of each sequence, behind `depth` tokens
};

double Bytes(const MlaShape& s, const Work& work) {
  const int64_t weights = s.heads * s.kv_lora_rank * (s.nope_dim + s.v_dim);
  const int64_t latents = work.sequences * (work.depth + work.rows) * s.latent_dim();
  return 2.0 * static_cast<double>(weights + latents);
}

// Pairs of a row and a key it attends to, plus what each form does to rows (absorbed) or keys (naive).
double Flops(const MlaShape& s, const Work& work) {
  const int64_t pairs = work.sequences * (work.rows * work.depth + work.rows * (work.rows + 1) / 2);
  const bool absorbed = work.form == MlaForm::kAbsorbed;
  const int64_t per_pair = absorbed ? s.latent_dim() + s.kv_lora_rank : s.q_dim() + s.v_dim;
  const int64_t multiplied = work.sequences * (absorbed ? work.rows : work.depth + work.rows);
  return 2.0 * static_cast<double>(s.heads *
                                   (pairs * per_pair + multiplied * s.kv_lora_rank * (s.nope_dim + s.v_dim)));
}

// Pages of latents, one random page over and over.
HugeBuffer MakeCache(int64_t pages, int64_t page_bytes, ThreadPool& pool) {
  HugeBuffer cache(pages * page_bytes);
  const std::vector<std::byte> page = RandomActivations(Precision::kBF16, page_bytes / 2);
  pool.ParallelFor(pages,
                   [&](int64_t i) { std::memcpy(cache.data() + i * page_bytes, page.data(), page.size()); });
  return cache;
}

struct State {
  explicit State(const Work& work) : shape(DeepSeekV2Config(static_cast<int32_t>(work.heads))) {}

  MlaShape shape;
  MlaScratch scratch;
  std::vector<float> q;
  std::vector<std::byte> out;
  std::vector<std::vector<uint32_t>> pages;  // of each sequence
  std::vector<MlaChunk> chunks;
  size_t weights = 0;
  int64_t page = 0;
};

KernelCase MlaCase(const std::string& name, const Work& work) {
  const MlaShape shape = State(work).shape;
  return {.name = name,
          .bytes = Bytes(shape, work),
          .flops = Flops(shape, work),
          .prepare = [=](Workspace& workspace) {
            ThreadPool& pool = workspace.pool();
            auto weights = workspace.Keep("weights", StrCat("mla", work.heads), [&] {
              const int64_t set_bytes = shape.heads * shape.kv_lora_rank * (shape.nope_dim + shape.v_dim) * 2;
              std::vector<MlaWeights> sets(RotatingSets(set_bytes));
              for (MlaWeights& set : sets)
                set = MlaWeights::Pack(shape, Precision::kBF16, PatternWeights, pool);
              return sets;
            });
            const int64_t page_bytes = kPageTokens * shape.latent_dim() * 2;
            const int64_t pages = RotatingSets(page_bytes);
            auto cache = workspace.Keep("cache", "mla", [&] { return MakeCache(pages, page_bytes, pool); });
            auto state = std::make_shared<State>(work);
            const int64_t rows = work.sequences * work.rows;
            state->q = RandomFloats(rows * shape.heads * shape.q_dim());
            state->out.resize(rows * shape.heads * shape.v_dim * 2);
            const int64_t sequence_pages = (work.depth + work.rows + kPageTokens - 1) / kPageTokens;
            state->pages.assign(work.sequences, std::vector<uint32_t>(sequence_pages));
            for (int64_t i = 0; i < work.sequences; ++i) {
              state->chunks.push_back({.row_begin = i * work.rows,
                                       .rows = work.rows,
                                       .position_begin = work.depth,
                                       .pages = state->pages[i],
                                       .form = work.form});
            }
            return [=, &pool] {
              for (std::vector<uint32_t>& sequence : state->pages) {
                for (uint32_t& page : sequence) page = static_cast<uint32_t>(state->page++ % pages);
              }
              MlaAttention(state->shape, (*weights)[state->weights++ % weights->size()], Precision::kBF16,
                           state->chunks, state->q.data(), rows, cache->data(), state->out.data(),
                           state->scratch, pool);
            };
          }};
}

}  // namespace

std::vector<KernelCase> MlaCases() {
  std::vector<KernelCase> cases;
  for (const int64_t heads : {16, 128}) {
    for (const int64_t batch : {1, 8, 32}) {
      for (const int64_t depth : {128, 2048, 8192}) {
        cases.push_back(MlaCase(StrCat("MlaDecode/heads:", heads, "/batch:", batch, "/depth:", depth),
                                {MlaForm::kAbsorbed, heads, batch, 1, depth - 1}));
      }
    }
    for (const int64_t chunk : {128, 512}) {
      for (const int64_t depth : {0, 2048}) {
        cases.push_back(MlaCase(StrCat("MlaPrefill/heads:", heads, "/chunk:", chunk, "/depth:", depth),
                                {MlaForm::kNaive, heads, 1, chunk, depth}));
      }
    }
  }
  return cases;
}

}  // namespace minke::kernels::bench
