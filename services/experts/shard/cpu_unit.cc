#include "services/experts/shard/cpu_unit.h"

#include "libs/base/status.h"

namespace minke::experts {

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
