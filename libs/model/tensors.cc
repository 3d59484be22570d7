#include "libs/model/tensors.h"

#include "libs/base/strings.h"

namespace minke {

std::string LayerPrefix(int32_t layer) { return StrCat("model.layers.", layer, "."); }

std::string ExpertPrefix(int32_t layer, int32_t expert) {
  return StrCat(LayerPrefix(layer), "mlp.experts.", expert, ".");
}

std::vector<TensorSpec> ExpectedTensors(const ModelConfig& c) {
  std::vector<TensorSpec> specs;
  int32_t layer = -1, expert = -1;
  const auto add = [&](std::string name, std::vector<int64_t> shape,
                       TensorRole role = TensorRole::kAttention) {
    specs.push_back({std::move(name), std::move(shape), role, layer, expert});
  };
  const auto add_ffn = [&](const std::string& prefix, int64_t inner, TensorRole role) {
    add(prefix + "gate_proj.weight", {inner, c.hidden_size}, role);
    add(prefix + "up_proj.weight", {inner, c.hidden_size}, role);
    add(prefix + "down_proj.weight", {c.hidden_size, inner}, role);
  };
  const int64_t heads = c.num_attention_heads;
  add("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  for (layer = 0; layer < c.num_hidden_layers; ++layer) {
    const std::string p = LayerPrefix(layer), a = p + "self_attn.";
    add(p + "input_layernorm.weight", {c.hidden_size});
    if (c.q_lora_rank > 0) {
      add(a + "q_a_proj.weight", {c.q_lora_rank, c.hidden_size});
      add(a + "q_a_layernorm.weight", {c.q_lora_rank});
      add(a + "q_b_proj.weight", {heads * c.qk_head_dim(), c.q_lora_rank});
    } else {
      add(a + "q_proj.weight", {heads * c.qk_head_dim(), c.hidden_size});
    }
    add(a + "kv_a_proj_with_mqa.weight", {c.latent_dim(), c.hidden_size});
    add(a + "kv_a_layernorm.weight", {c.kv_lora_rank});
    add(a + "kv_b_proj.weight", {heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank});
    add(a + "o_proj.weight", {c.hidden_size, heads * c.v_head_dim});
    add(p + "post_attention_layernorm.weight", {c.hidden_size});
    if (!c.IsMoeLayer(layer)) {
      add_ffn(p + "mlp.", c.intermediate_size, TensorRole::kAttention);
      continue;
    }
    add(p + "mlp.gate.weight", {c.n_routed_experts, c.hidden_size}, TensorRole::kRouter);
    for (expert = 0; expert < c.n_routed_experts; ++expert) {
      add_ffn(ExpertPrefix(layer, expert), c.moe_intermediate_size, TensorRole::kExpert);
    }
    expert = -1;
    if (c.n_shared_experts > 0) {
      add_ffn(p + "mlp.shared_experts.", c.shared_intermediate_size(), TensorRole::kAttention);
    }
  }
  layer = -1;
  add("model.norm.weight", {c.hidden_size});
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, c.hidden_size});
  return specs;
}

}  // namespace minke
