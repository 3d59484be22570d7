#include "services/attention/layers/cuda_whole_model.h"

#include <algorithm>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/cuda_model/whole_model.h"
#include "services/attention/layers/cuda_common.h"

namespace minke::attention {
namespace {

using cuda_model::GpuChunk;

// Everything on one GPU: a step of decoding is one CUDA graph.
class CudaWholeModel final : public AttentionModel, public WholeSteps {
 public:
  CudaWholeModel(std::shared_ptr<const Checkpoint> checkpoint, bool fp8_experts)
      : checkpoint_(std::move(checkpoint)), config_(checkpoint_->config()) {
    options_.experts = fp8_experts ? cuda::FfnFormat::kFP8 : cuda::FfnFormat::kBF16;
  }

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
    options_.context_max = ContextMax(config_, limits);
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

  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override {
    OrExit(model_->attention().ReadPage(layer, page, latents));
  }
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override {
    OrExit(model_->attention().WritePage(layer, page, latents));
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

}  // namespace

std::unique_ptr<AttentionModel> MakeCudaWholeModel(std::shared_ptr<const Checkpoint> checkpoint,
                                                   bool fp8_experts) {
  return std::make_unique<CudaWholeModel>(std::move(checkpoint), fp8_experts);
}

}  // namespace minke::attention
