#include "services/experts/compute/group_rows.h"

namespace minke::experts {

void SplitByGroup(const ModelConfig& config, const Units& units, uint32_t layer, uint32_t job,
                  const wire::WorkView& view, std::vector<GroupRow>& hosted, std::vector<GroupRow>& missing) {
  for (uint32_t r = 0; r < view.rows.size(); ++r) {
    const uint32_t begin = view.rows[r].pairs_begin(), end = begin + view.rows[r].pairs_count;
    for (uint32_t p = begin; p < end;) {  // experts ascend, so a group's pairs are neighbours
      const int32_t group = config.GroupOfExpert(view.pairs[p].expert);
      GroupRow row{job, r, static_cast<uint16_t>(group), p, p};
      while (row.pair_end < end && config.GroupOfExpert(view.pairs[row.pair_end].expert) == group)
        ++row.pair_end;
      p = row.pair_end;
      (units.contains({layer, static_cast<uint32_t>(group)}) ? hosted : missing).push_back(row);
    }
  }
}

}  // namespace minke::experts
