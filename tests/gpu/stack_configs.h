// Configurations of small random stacks with the dimensions the Hopper kernels are made for.
#pragma once

#include <string>

namespace minke::testing_support {

// Gates of random weights are steep (logits of deviation 4): with V2's factor of 16 on their outputs the last
// bit of a bf16 becomes 15 % of the logits, on any device. The shipped model has the factor, and trained
// gates.
inline std::string StackConfig(const std::string& rest) {
  return R"({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
    "vocab_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 3, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": false, "scoring_func": "softmax",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": false,
    "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}, )" +
         rest + "}";
}
inline std::string LiteConfig() {
  return StackConfig(R"("hidden_size": 512, "moe_intermediate_size": 128, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_routed_experts": 64, "routed_scaling_factor": 1.0, "q_lora_rank": null,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy")");
}
inline std::string V2Config() {
  return StackConfig(R"("hidden_size": 1024, "moe_intermediate_size": 64, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 160, "routed_scaling_factor": 1.0, "q_lora_rank": 256,
    "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy")");
}

}  // namespace minke::testing_support
