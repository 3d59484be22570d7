#include "services/attention/layers/cuda_models.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/collective/nccl/nccl_group.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/cuda_model/weight_transfer.h"
#include "libs/cuda_model/whole_model.h"
#include "services/attention/layers/tensor_parallel_model.h"

namespace minke::attention {
namespace {

using cuda_model::AttentionOnGpu;
using cuda_model::GpuBatch;
using cuda_model::GpuChunk;

// Rows of one call of Logits by the engine (kLogitRowsMax there).
constexpr int64_t kLogitRowsMin = 64;

// For which giver and receiver of weights wait for each other, at the beginning and for every few tensors.
constexpr absl::Duration kTransferDeadline = absl::Seconds(60);

// A GPU that has failed computes nothing more in this process. Its streams go on elsewhere, as when the
// machine dies.
void OrExit(const absl::Status& status) {
  if (status.ok()) return;
  log::Error("attention", StrCat("the GPU failed: ", status.message()));
  std::_Exit(1);
}

template <class T>
T OrExit(absl::StatusOr<T> result) {
  OrExit(result.status());
  return *std::move(result);
}

int64_t CacheBytes(const ModelConfig& c) {
  return int64_t{c.num_hidden_layers} * c.latent_dim() * ActivationBytes(Precision::kBF16);
}

// The tokens of a microbatch's chunks, as the GPU's batches take them.
class TokenSpans {
 public:
  explicit TokenSpans(const Microbatch& batch) {
    tokens_.reserve(batch.rows.size());
    for (const StepRow& row : batch.rows) tokens_.push_back(row.token);
  }
  GpuChunk Chunk(const kernels::MlaChunk& chunk) const { return Rows(chunk, 0, chunk.rows); }
  GpuChunk Rows(const kernels::MlaChunk& chunk, int64_t begin, int64_t count) const {
    return {{tokens_.data() + chunk.row_begin + begin, static_cast<size_t>(count)},
            chunk.position_begin + begin,
            chunk.pages};
  }

 private:
  std::vector<uint32_t> tokens_;
};

// An attention node's part, or a rank's share of it: rows go to the expert servers, and their sums come back,
// through page-locked memory. Every call makes the model's GPU the calling thread's: ranks are loaded by one
// thread and compute on others.
class CudaAttentionModel final : public AttentionModel {
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
    MK_ASSIGN_OR_RETURN(
        gpu_, AttentionOnGpu::Create(*std::exchange(weights_, std::nullopt), options, std::move(group_)));
    const int64_t values = limits.rows_max * config_.hidden_size;
    MK_ASSIGN_OR_RETURN(normed_, cuda::PinnedBuffer::Allocate(values * int64_t{sizeof(bf16)}));
    for (int i = 0; i < limits.microbatches; ++i) {
      MK_ASSIGN_OR_RETURN(std::unique_ptr<GpuBatch> batch, gpu_->MakeBatch());
      MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer routed,
                          cuda::PinnedBuffer::Allocate(values * int64_t{sizeof(float)}));
      batches_.push_back(std::move(batch));
      routed_.push_back(std::move(routed));
    }
    one_sum_per_row_.resize(limits.rows_max + 1);
    std::iota(one_sum_per_row_.begin(), one_sum_per_row_.end(), 0);
    return absl::OkStatus();
  }

  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override {
    return gpu_->Absorbed(rows, position_begin) ? kernels::MlaForm::kAbsorbed : kernels::MlaForm::kNaive;
  }

  void Embed(const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    const TokenSpans tokens(batch);
    std::vector<GpuChunk> chunks;
    for (const kernels::MlaChunk& chunk : batch.chunks) chunks.push_back(tokens.Chunk(chunk));
    GpuBatch& gpu = *batches_[batch.index];
    OrExit(gpu_->Begin(gpu, chunks));
    OrExit(gpu_->Embed(gpu));
  }

  void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) override {
    const cuda::DeviceScope scope = Enter();
    GpuBatch& gpu = *batches_[batch.index];
    OrExit(gpu_->Attention(layer, gpu));
    if (rows == nullptr) return;
    OrExit(gpu_->DownloadNormed(gpu, normed_.as<bf16>()));
    OrExit(gpu_->Synchronize());
    std::memcpy(rows, normed_.as(), batch.size() * config_.hidden_size * sizeof(bf16));
  }

  void FeedForward(int32_t layer, const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    OrExit(gpu_->FeedForward(layer, *batches_[batch.index]));
  }

  // Free again: since it was last uploaded, Attention or Logits has waited for the stream. (The first rank's
  // has waited for all ranks: sums of theirs that come after the upload were in what it waited for.)
  float* RoutedTarget(const Microbatch& batch) override {
    float* sums = routed_[batch.index].as<float>();
    std::fill(sums, sums + batch.size() * config_.hidden_size, 0.0f);
    return sums;
  }
  void AddRouted(const Microbatch& batch) override {
    const cuda::DeviceScope scope = Enter();
    const std::span<const int32_t> begin(one_sum_per_row_.data(), static_cast<size_t>(batch.size() + 1));
    OrExit(gpu_->AddPartials(*batches_[batch.index], begin, routed_[batch.index].as<float>()));
  }

  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) override {
    const cuda::DeviceScope scope = Enter();
    (void)OrExit(gpu_->Logits(*batches_[batch.index], selected));
    OrExit(gpu_->DownloadLogits(0, std::ssize(selected), logits));
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
  cuda::DeviceScope Enter() const { return OrExit(cuda::DeviceScope::Enter(device_)); }

  const ModelConfig config_;
  const int device_;
  std::optional<cuda_model::AttentionWeights> weights_;  // until Prepare
  std::unique_ptr<DeviceCollective> group_;              // until Prepare
  std::unique_ptr<AttentionOnGpu> gpu_;
  std::vector<std::unique_ptr<GpuBatch>> batches_;  // by microbatch
  cuda::PinnedBuffer normed_;                       // [rows_max, hidden] bf16
  std::vector<cuda::PinnedBuffer> routed_;          // by microbatch: [rows_max, hidden] f32
  std::vector<int32_t> one_sum_per_row_;            // 0, 1, 2 ...
};

// Everything on one GPU: a step of decoding is one CUDA graph.
class CudaWholeModel final : public AttentionModel, public WholeSteps {
 public:
  explicit CudaWholeModel(std::shared_ptr<const Checkpoint> checkpoint)
      : checkpoint_(std::move(checkpoint)), config_(checkpoint_->config()) {}

  const ModelConfig& config() const override { return config_; }
  Precision precision() const override { return Precision::kBF16; }
  int64_t CacheBytesPerToken() const override { return CacheBytes(config_); }
  int64_t cache_pages() const override { return options_.attention.cache_pages; }
  WholeSteps* whole() override { return this; }

  absl::Status Prepare(const ModelLimits& limits) override {
    options_.attention.rows_max = limits.rows_max;
    // A prompt whose log-probabilities are wanted goes row by row.
    options_.attention.sequences_max = std::max(limits.rows_max, kLogitRowsMin);
    options_.attention.cache_pages = limits.cache_pages;
    options_.context_max = limits.cache_pages * kernels::kPageTokens;
    options_.allowed = limits.allowed_tokens;
    decode_rows_max_ = 0;
    for (const int32_t bucket : options_.buckets) {
      if (bucket <= options_.attention.rows_max) decode_rows_max_ = bucket;
    }
    const int32_t layers = config_.num_hidden_layers;
    MK_ASSIGN_OR_RETURN(cuda_model::CheckpointSource source,
                        cuda_model::CheckpointSource::Create(*checkpoint_));
    MK_ASSIGN_OR_RETURN(model_, cuda_model::WholeModel::Create(config_, source, options_, [&](int32_t layer) {
                          if (layer % 8 == 0)
                            log::Info("attention", StrCat("loading layers: ", layer, " of ", layers));
                        }));
    return absl::OkStatus();
  }

  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override {
    return model_->attention().Absorbed(rows, position_begin) ? kernels::MlaForm::kAbsorbed
                                                              : kernels::MlaForm::kNaive;
  }

  bool CanDraw(const SamplingParams& p) const override {
    return p.presence_penalty == 0 && p.frequency_penalty == 0 &&
           (p.repetition_penalty == 1 || p.repetition_penalty <= 0) && p.logit_bias.empty();
  }

  void Step(const Microbatch& batch, std::span<const DrawRow> draws, std::span<uint32_t> tokens) override {
    logits_row_.assign(batch.rows.size(), -1);
    const auto draw_at = [&](int64_t row) -> const DrawRow* {
      const auto at = std::lower_bound(draws.begin(), draws.end(), row,
                                       [](const DrawRow& draw, int64_t wanted) { return draw.row < wanted; });
      return at != draws.end() && at->row == row ? &*at : nullptr;
    };
    const TokenSpans spans(batch);
    const bool decoding =
        batch.size() <= decode_rows_max_ &&
        std::all_of(batch.chunks.begin(), batch.chunks.end(), [](const auto& c) { return c.rows == 1; });
    std::vector<int64_t> last_rows;  // whose logits come, in order
    std::vector<uint32_t> drawn;
    if (decoding) {
      std::vector<cuda_model::DecodeInput> inputs;
      for (const kernels::MlaChunk& chunk : batch.chunks) {
        const StepRow& row = batch.rows[chunk.row_begin];
        inputs.push_back({row.token, row.position, chunk.pages, SamplingOf(draw_at(chunk.row_begin))});
        last_rows.push_back(chunk.row_begin);
      }
      const std::span<const uint32_t> result = OrExit(model_->Decode(inputs));
      drawn.assign(result.begin(), result.end());
    } else {
      // A chunk from whose middle logits are wanted is cut there. Those in the absorbed form come first.
      struct Cut {
        GpuChunk chunk;
        int64_t last_row;
      };
      std::vector<Cut> cuts;
      for (const kernels::MlaChunk& chunk : batch.chunks) {
        for (int64_t begin = 0, end = 1; begin < chunk.rows; end = begin + 1) {
          while (end < chunk.rows && draw_at(chunk.row_begin + end - 1) == nullptr) ++end;
          cuts.push_back({spans.Rows(chunk, begin, end - begin), chunk.row_begin + end - 1});
          begin = end;
        }
      }
      std::partition(cuts.begin(), cuts.end(), [&](const Cut& cut) {
        return model_->attention().Absorbed(std::ssize(cut.chunk.tokens), cut.chunk.position_begin);
      });
      std::vector<GpuChunk> chunks;
      std::vector<cuda::SampleRow> sampling;
      for (const Cut& cut : cuts) {
        chunks.push_back(cut.chunk);
        sampling.push_back(SamplingOf(draw_at(cut.last_row)));
        last_rows.push_back(cut.last_row);
      }
      drawn = OrExit(model_->Step(chunks, sampling));
    }
    for (size_t i = 0; i < last_rows.size(); ++i) {
      logits_row_[last_rows[i]] = static_cast<int32_t>(i);
      if (const DrawRow* draw = draw_at(last_rows[i])) {
        tokens[draw - draws.data()] = draw->params == nullptr ? kNoToken : drawn[i];
      }
    }
  }

  void Logits(const Microbatch&, std::span<const int32_t> selected, float* logits) override {
    for (size_t i = 0; i < selected.size(); ++i) {
      const int32_t row = logits_row_[selected[i]];
      MK_CHECK(row >= 0);
      OrExit(model_->attention().DownloadLogits(row, 1, logits + i * config_.vocab_size));
    }
  }

  // Step computes all of it.
  void Embed(const Microbatch&) override {}
  void Attention(int32_t, const Microbatch&, std::byte*) override {}
  void FeedForward(int32_t, const Microbatch&) override {}
  float* RoutedTarget(const Microbatch&) override { return nullptr; }
  void AddRouted(const Microbatch&) override {}

 private:
  static_assert(kNoToken == cuda::kNoToken);
  static cuda::SampleRow SamplingOf(const DrawRow* draw) {
    if (draw == nullptr || draw->params == nullptr) return {};
    const SamplingParams& p = *draw->params;
    return {p.seed, draw->position, p.temperature, p.top_p, p.min_p, p.top_k};
  }

  const std::shared_ptr<const Checkpoint> checkpoint_;  // shared with the process's other roles
  const ModelConfig config_;
  cuda_model::WholeModel::Options options_;
  std::unique_ptr<cuda_model::WholeModel> model_;
  int64_t decode_rows_max_ = 0;      // of a graph
  std::vector<int32_t> logits_row_;  // by row of the last step; -1: none
};

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
  if (options.whole) return std::make_unique<CudaWholeModel>(std::move(checkpoint));
  MK_ASSIGN_OR_RETURN(AttentionWeights weights, LoadWeights(*checkpoint, options, share, progress));
  return std::make_unique<CudaAttentionModel>(checkpoint->config(), device, std::move(weights),
                                              std::move(options.group));
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
