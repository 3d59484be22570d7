#include <numeric>
#include <random>

#include "libs/base/strings.h"
#include "libs/kernels/bench/kernel_case.h"
#include "libs/kernels/cpu/grouped_ffn.h"

namespace minke::kernels::bench {
namespace {

struct Pool {
  int64_t experts, hidden, inner;
};
// A layer's share of one of eight expert servers of DeepSeek-V2, and a whole layer of
// bench/v2-bench.config.json.
constexpr Pool kPools[] = {{20, 5120, 1536}, {160, 1024, 384}};

// What routing really gives a layer: experts without rows, many with a few, and a hot one.
std::vector<int64_t> RaggedCounts(int64_t experts) {
  std::mt19937 rng(1);
  std::vector<int64_t> counts(experts);
  for (int64_t& count : counts) count = rng() % 3 == 0 ? 0 : 1 + static_cast<int64_t>(rng() % 8);
  counts[experts / 2] = 128;
  return counts;
}

KernelCase FfnCase(const Pool& shape, const std::string& rows_name, const std::vector<int64_t>& counts) {
  const auto [experts, hidden, inner] = shape;
  const int64_t expert_elements = 3 * hidden * inner;
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const auto active = std::count_if(counts.begin(), counts.end(), [](int64_t count) { return count > 0; });
  return {.name = StrCat("GroupedFfn/", experts, "x", hidden, "x", inner, "/", rows_name),
          .bytes = static_cast<double>(active * expert_elements * 2),
          .flops = 2.0 * static_cast<double>(rows * expert_elements),
          .prepare = [=](Workspace& workspace) {
            ThreadPool& pool = workspace.pool();
            auto weights = workspace.Keep("weights", StrCat("ffn", experts, "x", hidden), [&] {
              std::vector<FfnWeights> sets(RotatingSets(experts * expert_elements * 2) * experts);
              for (FfnWeights& set : sets) {
                set = FfnWeights::Pack(hidden, inner, Precision::kBF16, PatternWeights, PatternWeights,
                                       PatternWeights, pool);
              }
              return sets;
            });
            struct State {
              FfnScratch scratch;
              std::vector<std::byte> x;
              std::vector<float> y;
              std::vector<FfnRows> items;
              size_t set = 0;
            };
            auto state = std::make_shared<State>();
            state->x = RandomActivations(Precision::kBF16, rows * hidden);
            state->y.resize(rows * hidden);
            int64_t begin = 0;
            for (const int64_t count : counts) {
              state->items.push_back({nullptr, begin, count});
              begin += count;
            }
            return [weights, state, &pool, experts = experts] {
              for (int64_t i = 0; i < experts; ++i)
                state->items[i].weights = &(*weights)[state->set * experts + i];
              state->set = (state->set + 1) % (weights->size() / experts);
              GroupedFfn(state->items, state->x.data(), state->y.data(), state->scratch, pool);
            };
          }};
}

}  // namespace

std::vector<KernelCase> FfnCases() {
  std::vector<KernelCase> cases;
  for (const Pool& pool : kPools) {
    for (const int64_t rows : {1, 4, 16, 64})
      cases.push_back(FfnCase(pool, StrCat(rows), std::vector<int64_t>(pool.experts, rows)));
    cases.push_back(FfnCase(pool, "ragged", RaggedCounts(pool.experts)));
  }
  return cases;
}

}  // namespace minke::kernels::bench
