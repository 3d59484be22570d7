#include "bench/gpu/random_model.h"

#include <cmath>
#include <numeric>

#include "bench/gpu/fill.h"
#include "libs/base/status.h"

namespace minke::bench {

using cuda::DeviceBuffer;
using cuda::Stream;
using cuda_model::AttentionOnGpu;

absl::Status RandomSource::ReadPart(const std::string& name, std::span<const int64_t> shape,
                                    const cuda_model::MatrixPart& part, DeviceBuffer& to, int64_t offset,
                                    const Stream& stream) {
  const float gain = name.ends_with("mlp.gate.weight") ? 4.0f : 1.2f;
  const float deviation =
      name.ends_with("embed_tokens.weight") ? 1 : gain / std::sqrt(static_cast<float>(shape[1]));
  return FillNormal(to.as<bf16>() + offset / 2, part.rows * part.columns, ++seed_, deviation, stream);
}

absl::Status RandomSource::ReadF32(const std::string&, int64_t count, DeviceBuffer& to,
                                   const Stream& stream) {
  const std::vector<float> ones(count, 1);
  MK_RETURN_IF_ERROR(to.Upload(ones.data(), count * 4, stream));
  return stream.Synchronize();
}

ModelConfig ShapeOf(bool v2, int layers) {
  const std::string shape =
      v2 ? R"("hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
              "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160,
              "routed_scaling_factor": 16.0, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy")"
         : R"("hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
              "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null, "n_routed_experts": 64,
              "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "topk_method": "greedy")";
  return ModelConfig::Parse(
             R"({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
    "vocab_size": 102400, "num_hidden_layers": )" +
             std::to_string(layers) + R"(, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": false, "scoring_func": "softmax",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": false,
    "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1, "rope_scaling": {"type": "yarn", "factor": 40,
    "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
    "mscale_all_dim": 0.707}, )" +
             shape + "}")
      .value();
}

absl::Status FillCache(AttentionOnGpu& attention) {
  const int64_t values = (attention.options().cache_pages + 1) * 64 * attention.config().latent_dim();
  for (int32_t layer = 0; layer < attention.config().num_hidden_layers; ++layer) {
    MK_RETURN_IF_ERROR(FillNormal(attention.cache(layer), values, 77 + layer, 1, attention.stream()));
  }
  return absl::OkStatus();
}

std::vector<std::vector<uint32_t>> ScatteredPages(int batch, int64_t each) {
  const int64_t count = batch * each;
  int64_t step = count * 5 / 8 | 1;
  while (std::gcd(step, count) != 1) step += 2;
  std::vector<std::vector<uint32_t>> pages(batch);
  for (int64_t i = 0, at = 0; i < count; ++i, at = (at + step) % count)
    pages[i % batch].push_back(static_cast<uint32_t>(at));
  return pages;
}

absl::StatusOr<std::unique_ptr<cuda_model::GpuBatch>> DecodingBatch(
    AttentionOnGpu& attention, int batch, int64_t context, const std::vector<std::vector<uint32_t>>& pages) {
  MK_ASSIGN_OR_RETURN(std::unique_ptr<cuda_model::GpuBatch> rows, attention.MakeBatch());
  const std::vector<uint32_t> tokens = {17};
  std::vector<cuda_model::GpuChunk> chunks;
  for (int i = 0; i < batch; ++i) chunks.push_back({tokens, context - 1, pages[i]});
  MK_RETURN_IF_ERROR(attention.Begin(*rows, chunks));
  MK_RETURN_IF_ERROR(attention.Embed(*rows));
  return rows;
}

}  // namespace minke::bench
