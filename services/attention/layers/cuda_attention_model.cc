#include "services/attention/layers/cuda_attention_model.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "libs/base/status.h"
#include "libs/collective/nccl/nccl_group.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/cuda_model/decode_segments.h"
#include "libs/cuda_model/weight_transfer.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "services/attention/layers/cuda_common.h"

namespace minke::attention {
namespace {

using cuda_model::AttentionOnGpu;
using cuda_model::DecodeSegments;
using cuda_model::GpuBatch;
using cuda_model::GpuChunk;

// An attention node's part, or a rank's share of it. Rows go to the expert servers, and their sums come back,
// in row memory where the exchange has it and the model is one rank, else through page-locked memory. Steps
// of decoding rows only are graphs, segment by segment; others are launched, and so is every step of a rank.
// Every call makes the model's GPU the calling thread's: ranks are loaded by one thread and compute on
// others.
class CudaAttentionModel final : public AttentionModel, private RowsOnDevice {
 public:
  CudaAttentionModel(ModelConfig config, int device, cuda_model::AttentionWeights weights,
                     std::unique_ptr<DeviceCollective> group)
      : config_(std::move(config)), device_(device), weights_(std::move(weights)), group_(std::move(group)) {}

  const ModelConfig& config() const override { return config_; }
  Precision precision() const override { return Precision::kBF16; }
  int64_t CacheBytesPerToken() const override { return CacheBytes(config_); }
  int64_t cache_pages() const override { return gpu_->options().cache_pages; }

  absl::Status Prepare(const ModelLimits& limits) override {
    MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(device_));
    AttentionOnGpu::Options options;
    options.rows_max = limits.rows_max;
    options.sequences_max = std::max(limits.sequences_max, kLogitRowsMin);
    options.cache_pages = limits.cache_pages;
    const bool alone = weights_->share.of == 1;
    MK_ASSIGN_OR_RETURN(
        gpu_, AttentionOnGpu::Create(*std::exchange(weights_, std::nullopt), options, std::move(group_)));
    const int64_t values = limits.rows_max * config_.hidden_size;
    const bool on_device = alone && limits.row_memory != nullptr && config_.n_routed_experts > 0;
    if (on_device) {
      MK_CHECK(limits.row_memory->on_gpu() && limits.row_memory->row_bytes() == config_.hidden_size * 2);
      MK_ASSIGN_OR_RETURN(combiner_,
                          MakeGpuRowCombiner(config_.hidden_size, limits.rows_max, config_.fan_out_max()));
    } else {
      MK_ASSIGN_OR_RETURN(normed_, cuda::PinnedBuffer::Allocate(values * int64_t{sizeof(bf16)}));
    }
    for (int i = 0; i < limits.microbatches; ++i) {
      Lane lane;
      MK_ASSIGN_OR_RETURN(lane.batch, gpu_->MakeBatch());
      // Rows that fill a bucket up are numbers.
      const float* sums = nullptr;
      if (on_device) {
        MK_ASSIGN_OR_RETURN(lane.sums, cuda::DeviceBuffer::Allocate(values * int64_t{sizeof(float)}));
        MK_RETURN_IF_ERROR(lane.sums.Fill(0, gpu_->stream()));
        sums = lane.sums.as<float>();
      } else {
        MK_ASSIGN_OR_RETURN(lane.routed, cuda::PinnedBuffer::Allocate(values * int64_t{sizeof(float)}));
        std::memset(lane.routed.as(), 0, lane.routed.bytes());
        sums = lane.routed.as<float>();
      }
      if (alone) {
        MK_ASSIGN_OR_RETURN(
            lane.segments,
            DecodeSegments::Create(*gpu_, *lane.batch, sums, normed_.as<bf16>(),
                                   {.context_max = ContextMax(config_, limits), .on_device = on_device}));
      }
      lanes_.push_back(std::move(lane));
    }
    return absl::OkStatus();
  }

  RowsOnDevice* on_device() override { return combiner_ != nullptr ? this : nullptr; }

  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override {
    const cuda::DeviceScope scope = Enter();
    OrExit(gpu_->ReadPage(layer, page, latents));
  }
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override {
    const cuda::DeviceScope scope = Enter();
    OrExit(gpu_->WritePage(layer, page, latents));
  }

  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override {
    return gpu_->Absorbed(rows, position_begin) ? kernels::MlaForm::kAbsorbed : kernels::MlaForm::kNaive;
  }

  void Embed(const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    lane.decoding =
        lane.segments != nullptr && batch.size() <= lane.segments->rows_max() &&
        std::all_of(batch.chunks.begin(), batch.chunks.end(), [](const auto& c) { return c.rows == 1; });
    lane.logits_there = false;
    if (lane.decoding) {
      std::vector<cuda_model::DecodeInput> inputs;  // in the order of the rows
      for (const kernels::MlaChunk& chunk : batch.chunks) {
        MK_CHECK(chunk.row_begin == std::ssize(inputs));
        const StepRow& row = batch.rows[chunk.row_begin];
        inputs.push_back({row.token, row.position, chunk.pages, {}});
      }
      return OrExit(lane.segments->Begin(inputs));
    }
    const TokenSpans tokens(batch);
    std::vector<GpuChunk> chunks;
    for (const kernels::MlaChunk& chunk : batch.chunks) chunks.push_back(tokens.Chunk(chunk));
    OrExit(gpu_->Begin(*lane.batch, chunks));
    OrExit(gpu_->Embed(*lane.batch));
  }

  void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    MK_CHECK(rows == nullptr || combiner_ == nullptr);
    if (lane.decoding) {
      OrExit(lane.segments->Attention(layer));
    } else {
      OrExit(gpu_->Attention(layer, *lane.batch));
      if (rows != nullptr) OrExit(gpu_->DownloadNormed(*lane.batch, normed_.as<bf16>()));
    }
    if (rows == nullptr) return;
    OrExit(gpu_->Synchronize());
    std::memcpy(rows, normed_.as(), batch.size() * config_.hidden_size * sizeof(bf16));
  }

  void FeedForward(int32_t layer, const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    OrExit(lane.decoding ? lane.segments->FeedForward(layer) : gpu_->FeedForward(layer, *lane.batch));
  }

  // Free again: since it was last uploaded, Attention or Logits has waited for the stream. (The first rank's
  // has waited for all ranks: sums of theirs that come after the upload were in what it waited for.)
  float* RoutedTarget(const Microbatch& batch) override {
    float* sums = lanes_[batch.index].routed.as<float>();
    std::fill(sums, sums + batch.size() * config_.hidden_size, 0.0f);
    return sums;
  }
  void AddRouted(const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    if (lane.decoding) return;  // the next segment begins with it
    OrExit(gpu_->AddSums(*lane.batch, lane.routed.as<float>()));
  }

  const std::byte* AttentionRows(int32_t layer, const Microbatch& batch) override {
    Attention(layer, batch, nullptr);
    const cuda::DeviceScope scope = Enter();
    OrExit(gpu_->Synchronize());
    return reinterpret_cast<const std::byte*>(lanes_[batch.index].batch->normed());
  }
  // Free again, as RoutedTarget's: the segment that read them is done.
  float* DeviceSums(const Microbatch& batch) override { return lanes_[batch.index].sums.as<float>(); }
  void AddDeviceSums(const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    if (lane.decoding) return;  // the next segment begins with it
    OrExit(gpu_->AddDeviceSums(*lane.batch, lane.sums.as<float>()));
  }
  RowCombiner& combiner() override { return *combiner_; }

  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) override {
    const cuda::DeviceScope scope = Enter();
    Lane& lane = lanes_[batch.index];
    if (!lane.decoding) {
      (void)OrExit(gpu_->Logits(*lane.batch, selected));
      return OrExit(gpu_->DownloadLogits(0, std::ssize(selected), logits));
    }
    // One graph for all rows; calls for more of them only fetch. Lanes are asked one after the other.
    if (!std::exchange(lane.logits_there, true)) OrExit(lane.segments->Logits());
    for (size_t begin = 0, end = 1; begin < selected.size(); begin = end, ++end) {  // runs of neighbours
      while (end < selected.size() && selected[end] == selected[end - 1] + 1) ++end;
      OrExit(gpu_->DownloadLogits(selected[begin], static_cast<int64_t>(end - begin),
                                  logits + static_cast<int64_t>(begin) * config_.vocab_size));
    }
  }

  // On a stream of its own, so that it only shares the GPU with the engine's work.
  absl::Status GiveWeights(const std::string& group_id, const std::atomic<bool>& stop) override {
    if (gpu_->weights().share.of > 1) return AttentionModel::GiveWeights(group_id, stop);
    MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(device_));
    MK_ASSIGN_OR_RETURN(const cuda::Stream stream, cuda::Stream::Create());
    MK_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceCollective> group,
                        JoinNcclGroup(group_id, 0, 2, kTransferDeadline, &stop));
    return cuda_model::SendWeights(cuda_model::PlanWeights(config_, {}), gpu_->weights(), *group, stream);
  }

 private:
  struct Lane {  // a microbatch
    std::unique_ptr<GpuBatch> batch;
    cuda::PinnedBuffer routed;                 // [rows_max, hidden] f32; empty where rows stay on the device,
    cuda::DeviceBuffer sums;                   // and then these are there
    std::unique_ptr<DecodeSegments> segments;  // null: of a rank of several
    bool decoding = false;                     // this step is one of graphs
    bool logits_there = false;                 // and its logits are computed
  };
  cuda::DeviceScope Enter() const { return OrExit(cuda::DeviceScope::Enter(device_)); }

  const ModelConfig config_;
  const int device_;
  std::optional<cuda_model::AttentionWeights> weights_;  // until Prepare
  std::unique_ptr<DeviceCollective> group_;              // until Prepare
  std::unique_ptr<AttentionOnGpu> gpu_;
  cuda::PinnedBuffer normed_;              // [rows_max, hidden] bf16; empty where they stay on the device
  std::unique_ptr<RowCombiner> combiner_;  // null: they do not
  std::vector<Lane> lanes_;                // by microbatch
};

}  // namespace

std::unique_ptr<AttentionModel> MakeCudaAttentionModel(ModelConfig config, int device,
                                                       cuda_model::AttentionWeights weights,
                                                       std::unique_ptr<DeviceCollective> group) {
  return std::make_unique<CudaAttentionModel>(std::move(config), device, std::move(weights),
                                              std::move(group));
}

}  // namespace minke::attention
