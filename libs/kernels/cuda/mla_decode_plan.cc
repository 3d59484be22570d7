#include "libs/kernels/cuda/mla_decode_plan.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

#include "absl/strings/str_cat.h"

namespace minke::cuda {
namespace {

constexpr int32_t kPageTokens = 64;

struct Item {
  int32_t row, rows, row_offset, first_limit, length, sequence, pages;
};

// Lays the items out with at most `payload` per worker; returns the workers needed. `emit(item, begin,
// pages)` is called once per segment, `next()` between workers.
template <class Emit, class Next>
int32_t Lay(std::span<const Item> items, int64_t payload, int32_t cost, Emit emit, Next next) {
  int32_t workers = 1;
  int64_t room = payload;
  for (const Item& item : items) {
    int32_t begin = 0;
    while (begin < item.pages) {
      const int64_t fits = room - cost;
      if (fits <= 0) {
        next();
        ++workers;
        room = payload;
        continue;
      }
      const int32_t take = static_cast<int32_t>(std::min<int64_t>(fits, item.pages - begin));
      emit(item, begin, take);
      begin += take;
      room -= take + cost;
    }
  }
  return workers;
}

// Whole items by worker, the longest first, each to the worker that has least; `payload` is that of the
// busiest.
std::vector<std::vector<int32_t>> ShareWhole(std::span<const Item> items, int32_t workers, int32_t cost,
                                             int64_t& payload) {
  std::vector<int32_t> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return items[a].pages > items[b].pages; });
  using Load = std::pair<int64_t, int32_t>;  // pages, worker
  std::priority_queue<Load, std::vector<Load>, std::greater<>> least;
  for (int32_t w = 0; w < workers; ++w) least.push({0, w});
  std::vector<std::vector<int32_t>> shares(workers);
  payload = 0;
  for (const int32_t i : order) {
    const auto [pages, worker] = least.top();
    least.pop();
    const int64_t after = pages + items[i].pages + cost;
    shares[worker].push_back(i);
    payload = std::max(payload, after);
    least.push({after, worker});
  }
  return shares;
}

DecodeSegment SegmentOf(const Item& item, int32_t begin, int32_t pages) {
  DecodeSegment segment = {};
  segment.row = item.row;
  segment.rows = item.rows;
  segment.row_offset = item.row_offset;
  segment.first_limit = item.first_limit;
  segment.length = item.length;
  segment.sequence = item.sequence;
  segment.page_begin = begin;
  segment.pages = pages;
  segment.split = -1;
  return segment;
}

}  // namespace

absl::StatusOr<MlaDecodePlan> PlanMlaDecode(std::span<const DecodeSequence> sequences,
                                            const MlaDecodePlanLimits& limits) {
  std::vector<Item> items;
  items.reserve(sequences.size());
  int64_t token = 0, total = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const DecodeSequence& sequence = sequences[s];
    if (sequence.queries < 1 || sequence.queries > 4 || sequence.length < sequence.queries) {
      return absl::InvalidArgumentError(absl::StrCat("sequence ", s, " has ", sequence.queries,
                                                     " queries and ", sequence.length, " tokens"));
    }
    const int32_t rows = sequence.queries * limits.heads;
    for (int32_t offset = 0; offset < rows; offset += limits.item_rows) {
      Item item;
      item.row = static_cast<int32_t>(token * limits.heads) + offset;
      item.rows = std::min(limits.item_rows, rows - offset);
      item.row_offset = offset;
      item.first_limit = sequence.length - sequence.queries + 1;
      item.length = sequence.length;
      item.sequence = static_cast<int32_t>(s);
      item.pages = (sequence.length + kPageTokens - 1) / kPageTokens;
      items.push_back(item);
      total += item.pages + limits.segment_cost;
    }
    token += sequence.queries;
  }

  // The smallest payload that needs no more workers than there are.
  const auto nothing = [](auto...) {};
  int64_t low = limits.segment_cost + 1;
  int64_t high = std::max<int64_t>(low, total);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (Lay(items, middle, limits.segment_cost, nothing, nothing) <= limits.workers) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }

  MlaDecodePlan plan;
  plan.tokens = token;
  plan.worker_begin.push_back(0);
  int64_t whole = 0;
  const auto shares = ShareWhole(items, limits.workers, limits.segment_cost, whole);
  if (whole <= high + high / 32 + limits.combine_cost) {
    plan.payload = whole;
    for (const std::vector<int32_t>& share : shares) {
      for (const int32_t i : share) plan.segments.push_back(SegmentOf(items[i], 0, items[i].pages));
      plan.worker_begin.push_back(static_cast<int32_t>(plan.segments.size()));
    }
    return plan;
  }
  plan.payload = high;
  Lay(
      items, high, limits.segment_cost,
      [&](const Item& item, int32_t begin, int32_t pages) {
        DecodeSegment segment = SegmentOf(item, begin, pages);
        if (pages < item.pages) {
          if (begin == 0) plan.combines.push_back({item.row, item.rows, plan.splits, 0});
          segment.split = plan.splits++;
          plan.splits_max = std::max(plan.splits_max, ++plan.combines.back().splits);
        }
        plan.segments.push_back(segment);
      },
      [&] { plan.worker_begin.push_back(static_cast<int32_t>(plan.segments.size())); });
  plan.worker_begin.resize(limits.workers + 1, static_cast<int32_t>(plan.segments.size()));
  return plan;
}

}  // namespace minke::cuda
