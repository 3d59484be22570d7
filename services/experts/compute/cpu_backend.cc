#include "services/experts/compute/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "services/experts/shard/cpu_unit.h"

namespace minke::experts {

absl::StatusOr<std::shared_ptr<const UnitWeights>> CpuBackend::LoadUnit(UnitId unit) {
  return LoadCpuUnit(checkpoint_, unit, precision_, load_pool_);
}

absl::StatusOr<std::unique_ptr<UnitBuilder>> CpuBackend::BuildUnit(UnitId unit) {
  return BuildCpuUnit(config_, unit, precision_);
}

uint64_t CpuBackend::UnitLayout(UnitId unit) const {
  return LayoutName(StrCat("cpu 1 ", ToString(precision_)), config_, unit);
}

absl::Status CpuBackend::Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                             std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                             std::span<uint8_t> finite) {
  const int64_t hidden = config_.hidden_size, row_bytes = hidden * ActivationBytes(precision_);
  pairs_.clear();
  pair_begin_.clear();
  for (uint32_t i = 0; i < rows.size(); ++i) {
    pair_begin_.push_back(static_cast<uint32_t>(pairs_.size()));
    for (uint32_t p = rows[i].pair_begin; p < rows[i].pair_end; ++p) {
      pairs_.push_back({jobs[rows[i].job].view.pairs[p].expert, i, static_cast<uint32_t>(pairs_.size())});
    }
  }
  // Expert by expert, each expert's rows in the order they came.
  position_of_.resize(pairs_.size());
  std::sort(pairs_.begin(), pairs_.end(), [](const Pair& a, const Pair& b) {
    return a.expert != b.expert ? a.expert < b.expert : a.position < b.position;
  });
  items_.clear();
  for (uint32_t at = 0; at < pairs_.size();) {
    const uint16_t expert = pairs_[at].expert;
    uint32_t end = at;
    for (; end < pairs_.size() && pairs_[end].expert == expert; ++end)
      position_of_[pairs_[end].position] = end;
    const auto& unit =
        static_cast<const CpuUnit&>(*units.at({layer, static_cast<uint32_t>(config_.GroupOfExpert(expert))}));
    items_.push_back({&unit.experts[expert - unit.range.begin], at, end - at});
    at = end;
  }
  std::byte* x = gathered_.Resize(std::ssize(pairs_) * row_bytes);
  for (size_t at = 0; at < pairs_.size(); ++at) {
    const GroupRow& row = rows[pairs_[at].group_row];
    std::memcpy(x + at * row_bytes, jobs[row.job].view.data + row.row * row_bytes, row_bytes);
  }
  float* y = outputs_.Resize(std::ssize(pairs_) * hidden);
  kernels::GroupedFfn(items_, x, y, scratch_, pool_);

  constexpr int64_t kGrain = 8;
  pool_.ParallelFor((std::ssize(rows) + kGrain - 1) / kGrain, [&](int64_t task) {
    for (int64_t i = task * kGrain; i < std::min(std::ssize(rows), (task + 1) * kGrain); ++i) {
      const wire::WorkView& view = jobs[rows[i].job].view;
      float* sum = nullptr;
      for (uint32_t p = rows[i].pair_begin; p < rows[i].pair_end; ++p) {
        float* row = y + int64_t{position_of_[pair_begin_[i] + p - rows[i].pair_begin]} * hidden;
        const float weight = view.pairs[p].weight;
        if (sum == nullptr) {
          kernels::Tiles().scale(row, weight, hidden);
          sum = row;  // every gathered row belongs to one pair, so its output may hold the sum
        } else {
          kernels::Tiles().add_scaled(sum, row, weight, hidden);
        }
      }
      float poison = 0;  // x * 0 is NaN exactly for what is not finite
      for (int64_t c = 0; c < hidden; ++c) poison += sum[c] * 0.0f;
      finite[i] = poison == 0.0f;
      kernels::ToActivation(precision_, sum, outs[i].at, hidden);
    }
  });
  return absl::OkStatus();
}

}  // namespace minke::experts
