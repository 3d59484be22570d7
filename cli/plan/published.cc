#include "cli/plan/published.h"

#include "libs/base/status.h"

namespace minke::cli {

const std::vector<std::string>& PublishedNames() {
  static const std::vector<std::string> names = {"v2", "v2-lite", "deepseek-v2", "deepseek-v2-lite"};
  return names;
}

ModelConfig PublishedShape(std::string_view name) {
  const bool lite = name.ends_with("lite");
  ModelConfig c;
  c.vocab_size = 102400;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = c.v_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.n_shared_experts = 2;
  c.num_experts_per_tok = 6;
  c.first_k_dense_replace = 1;
  c.max_position_embeddings = 163840;
  if (lite) {
    c.num_hidden_layers = 27;
    c.hidden_size = 2048;
    c.intermediate_size = 10944;
    c.moe_intermediate_size = 1408;
    c.num_attention_heads = 16;
    c.n_routed_experts = 64;
  } else {
    c.num_hidden_layers = 60;
    c.hidden_size = 5120;
    c.intermediate_size = 12288;
    c.moe_intermediate_size = 1536;
    c.num_attention_heads = 128;
    c.q_lora_rank = 1536;
    c.n_routed_experts = 160;
    c.topk_method = TopkMethod::kGroupLimitedGreedy;
    c.n_group = 8;
    c.topk_group = 3;
    c.routed_scaling_factor = 16;
  }
  return c;
}

absl::StatusOr<ModelConfig> ShapeToPlan(const std::string& checkpoint, const std::string& name) {
  if (checkpoint.empty()) return PublishedShape(name);
  MK_ASSIGN_OR_RETURN(ModelConfig config, ModelConfig::Load(checkpoint));
  if (config.MoeLayers().empty())
    return absl::InvalidArgumentError(
        StrCat(checkpoint, ": expected layers with routed experts, found none"));
  return config;
}

}  // namespace minke::cli
