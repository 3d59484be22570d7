#include "services/attention/layers/cuda_models.h"

#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/collective/nccl/nccl_group.h"
#include "libs/cuda_model/weight_transfer.h"
#include "services/attention/layers/cuda_attention_model.h"
#include "services/attention/layers/cuda_common.h"
#include "services/attention/layers/cuda_whole_model.h"
#include "services/attention/layers/tensor_parallel_model.h"

namespace minke::attention {
namespace {

using cuda_model::AttentionWeights;

absl::StatusOr<AttentionWeights> ReceiveWeights(const ModelConfig& config, const CudaModelOptions& options,
                                                const cuda::Stream& stream,
                                                absl::FunctionRef<void(int32_t)> progress) {
  MK_ASSIGN_OR_RETURN(const std::string group_id, options.ask_for_weights());
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceCollective> group,
                      JoinNcclGroup(group_id, 1, 2, kTransferDeadline));
  const std::vector<cuda_model::PlannedTensor> plan = cuda_model::PlanWeights(config, {});
  cuda_model::BroadcastSource source(plan, *group);
  return AttentionWeights::Load(config, source, stream, progress);
}

absl::StatusOr<AttentionWeights> LoadWeights(const Checkpoint& checkpoint, const CudaModelOptions& options,
                                             kernels::Share share,
                                             absl::FunctionRef<void(int32_t)> progress) {
  MK_ASSIGN_OR_RETURN(const cuda::Stream loading, cuda::Stream::Create());
  if (options.ask_for_weights) {
    const absl::Time begin = absl::Now();
    absl::StatusOr<AttentionWeights> received =
        ReceiveWeights(checkpoint.config(), options, loading, progress);
    if (received.ok()) {
      log::Info("attention", StrCat("weights came from a running node in ",
                                    absl::ToInt64Milliseconds(absl::Now() - begin), " ms"));
      return received;
    }
    log::Warning("attention", StrCat("no weights from a running node, reading the checkpoint: ",
                                     received.status().message()));
  }
  MK_ASSIGN_OR_RETURN(cuda_model::CheckpointSource source, cuda_model::CheckpointSource::Create(checkpoint));
  return AttentionWeights::Load(checkpoint.config(), source, loading, progress, share);
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaModel(std::shared_ptr<const Checkpoint> checkpoint,
                                                              CudaModelOptions options,
                                                              absl::FunctionRef<void(int32_t)> progress) {
  if (options.mla != MlaChoice::kAuto) {
    return absl::InvalidArgumentError("--mla: expected auto on a GPU, which chooses by the chunk");
  }
  MK_ASSIGN_OR_RETURN(const cuda::DeviceInfo info, cuda::CurrentDevice());
  MK_ASSIGN_OR_RETURN(const int device, cuda::CurrentDeviceIndex());
  const kernels::Share share =
      options.group ? kernels::Share{options.group->rank(), options.group->size()} : kernels::Share{};
  log::Info("attention", StrCat("computing on GPU ", device, ", ", info.name,
                                options.group ? StrCat(", rank ", share.index, " of ", share.of) : ""));
  MK_RETURN_IF_ERROR(cuda_model::CheckSupported(checkpoint->config(), share.of));
  if (options.whole) return MakeCudaWholeModel(std::move(checkpoint), options.fp8_experts);
  MK_ASSIGN_OR_RETURN(AttentionWeights weights, LoadWeights(*checkpoint, options, share, progress));
  return MakeCudaAttentionModel(checkpoint->config(), device, std::move(weights), std::move(options.group));
}

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadCudaRanks(
    const std::shared_ptr<const Checkpoint>& checkpoint, MlaChoice mla, int ranks, int threads,
    absl::FunctionRef<void(int32_t)> progress) {
  MK_RETURN_IF_ERROR(cuda_model::CheckSupported(checkpoint->config(), ranks));
  absl::StatusOr<std::vector<std::unique_ptr<DeviceCollective>>> group = MakeNcclGroup(ranks);
  MK_RETURN_IF_ERROR(Annotate(group.status(), "--tensor-parallel"));
  return TensorParallelModel::Load(
      ranks, threads, [&](int rank, ThreadPool&) -> absl::StatusOr<std::unique_ptr<AttentionModel>> {
        MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(rank));
        return LoadCudaModel(checkpoint, {.mla = mla, .group = std::move((*group)[rank])}, progress);
      });
}

uint64_t WeightsChecksum(const ModelConfig& config) {
  return cuda_model::ChecksumOf(cuda_model::PlanWeights(config, {}));
}

absl::StatusOr<std::string> NewWeightsGroup() { return NewNcclGroupId(); }

}  // namespace minke::attention
