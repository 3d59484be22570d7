#include "services/experts/shard/cpu_unit.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "libs/base/status.h"

namespace minke::experts {
namespace {

// Calls copy(part, at) for every part of the packed form that overlaps bytes [begin, begin + size), `at`
// counted from `begin`.
template <typename Experts, typename Copy>
void ForParts(Experts& experts, int64_t begin, int64_t size, const Copy& copy) {
  int64_t part_begin = 0;
  for (auto& expert : experts) {
    for (const auto part : expert.storage()) {
      const int64_t from = std::max(begin, part_begin),
                    to = std::min(begin + size, part_begin + std::ssize(part));
      if (from < to) copy(part.subspan(from - part_begin, to - from), from - begin);
      part_begin += std::ssize(part);
    }
  }
}

class CpuUnitBuilder final : public UnitBuilder {
 public:
  explicit CpuUnitBuilder(std::shared_ptr<CpuUnit> unit) : unit_(std::move(unit)) {}
  int64_t bytes() const override { return unit_->bytes(); }
  absl::Status Write(int64_t begin, std::span<const std::byte> bytes) override {
    ForParts(unit_->experts, begin, std::ssize(bytes), [&](std::span<std::byte> part, int64_t at) {
      std::memcpy(part.data(), bytes.data() + at, part.size());
    });
    return absl::OkStatus();
  }
  absl::StatusOr<std::shared_ptr<const UnitWeights>> Finish() override { return std::move(unit_); }

 private:
  std::shared_ptr<CpuUnit> unit_;
};

}  // namespace

absl::Status CpuUnit::Read(int64_t begin, std::span<std::byte> out) const {
  ForParts(experts, begin, std::ssize(out), [&](std::span<const std::byte> part, int64_t at) {
    std::memcpy(out.data() + at, part.data(), part.size());
  });
  return absl::OkStatus();
}

std::unique_ptr<UnitBuilder> BuildCpuUnit(const ModelConfig& config, UnitId unit, Precision precision) {
  auto weights = std::make_shared<CpuUnit>();
  weights->range = config.GroupExperts(static_cast<int32_t>(unit.group));
  for (int32_t expert = weights->range.begin; expert < weights->range.end; ++expert) {
    weights->experts.push_back(
        kernels::FfnWeights::Empty(config.hidden_size, config.moe_intermediate_size, precision));
  }
  return std::make_unique<CpuUnitBuilder>(std::move(weights));
}

int64_t CpuUnit::bytes() const {
  int64_t sum = 0;
  for (const kernels::FfnWeights& expert : experts) sum += expert.bytes();
  return sum;
}

absl::StatusOr<std::shared_ptr<const CpuUnit>> LoadCpuUnit(const Checkpoint& checkpoint, UnitId unit,
                                                           Precision precision, ThreadPool& pool) {
  const ModelConfig& config = checkpoint.config();
  auto weights = std::make_shared<CpuUnit>();
  weights->range = config.GroupExperts(static_cast<int32_t>(unit.group));
  for (int32_t expert = weights->range.begin; expert < weights->range.end; ++expert) {
    MK_ASSIGN_OR_RETURN(
        kernels::FfnWeights ffn,
        kernels::FfnWeights::Load(checkpoint, ExpertPrefix(static_cast<int32_t>(unit.layer), expert),
                                  config.hidden_size, config.moe_intermediate_size, precision, pool));
    weights->experts.push_back(std::move(ffn));
  }
  return weights;
}

}  // namespace minke::experts
