#include "services/experts/compute/launch_plan.h"

#include <algorithm>

namespace minke::experts {
namespace {

int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

int32_t LaunchSlots(const ModelConfig& config) {
  int32_t largest = 0;
  for (int32_t g = 0; g < config.placement_groups(); ++g) {
    largest = std::max(largest, config.GroupExperts(g).size());
  }
  return std::min(config.num_experts_per_tok, largest);
}

UploadLayout LayOutUpload(int64_t rows, int64_t outputs, int64_t slots, int64_t hidden, bool targets) {
  UploadLayout at;
  at.experts = at.source + Aligned(outputs * 4);
  at.weights = at.experts + Aligned(outputs * slots * 4);
  at.targets = at.weights + Aligned(outputs * slots * 4);
  at.rows = at.targets + (targets ? Aligned(outputs * 4) : 0);
  at.bytes = at.rows + rows * hidden * 2;
  return at;
}

DownloadLayout LayOutDownload(int64_t sums, int64_t outputs, int64_t hidden) {
  DownloadLayout at;
  at.finite = at.partials + Aligned(sums * hidden * 2);
  at.bytes = at.finite + outputs;
  return at;
}

void LaunchPlan::Make(std::span<const GroupRow> group_rows) {
  group_rows_ = group_rows;
  rows_.clear();
  row_of_.clear();
  runs_.clear();
  next_.assign(config_.placement_groups(), 0);
  for (const GroupRow& g : group_rows) {
    // A row's groups follow one another.
    if (rows_.empty() || rows_.back().job != g.job || rows_.back().row != g.row)
      rows_.push_back({g.job, g.row});
    row_of_.push_back(static_cast<int32_t>(rows_.size()) - 1);
    ++next_[g.group];
  }
  int32_t begin = 0;
  for (uint32_t group = 0; group < next_.size(); ++group) {
    const int32_t end = begin + next_[group];
    if (end > begin) runs_.push_back({group, begin, end});
    next_[group] = begin;
    begin = end;
  }
  order_.resize(group_rows.size());
  for (uint32_t i = 0; i < group_rows.size(); ++i) order_[next_[group_rows[i].group]++] = i;
}

void LaunchPlan::WriteTables(std::span<const LaunchJob> jobs, std::span<const int32_t> numbers,
                             const UploadLayout& layout, std::byte* block) const {
  auto* source = reinterpret_cast<int32_t*>(block + layout.source);
  auto* experts = reinterpret_cast<int32_t*>(block + layout.experts);
  auto* weights = reinterpret_cast<float*>(block + layout.weights);
  for (size_t i = 0; i < order_.size(); ++i, experts += slots_, weights += slots_) {
    const GroupRow& g = group_rows_[order_[i]];
    const int32_t row = row_of_[order_[i]];
    source[i] = numbers.empty() ? row : numbers[row];
    const int32_t first = config_.GroupExperts(g.group).begin;
    const auto pairs = jobs[g.job].view.pairs.subspan(g.pair_begin, g.pair_end - g.pair_begin);
    for (int32_t k = 0; k < slots_; ++k) {
      const bool pair = k < std::ssize(pairs);
      experts[k] = pair ? pairs[k].expert - first : -1;
      weights[k] = pair ? pairs[k].weight : 0;
    }
  }
}

}  // namespace minke::experts
