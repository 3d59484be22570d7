// Shape of a DeepSeek-V2 model, from a checkpoint's config.json. Every field of the published configurations
// is read or refused; nothing falls back to a default of somebody's code. Source: arXiv 2405.04434,
// docs/checkpoints.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace minke {

enum class TopkMethod { kGreedy, kGroupLimitedGreedy };

struct YarnConfig {
  double factor = 1;
  int32_t original_max_position_embeddings = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 0;
};

// Half-open range of routed experts.
struct ExpertRange {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t size() const { return end - begin; }
};

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;      // dense layers
  int32_t moe_intermediate_size = 0;  // one expert
  int32_t num_hidden_layers = 0;
  int32_t num_attention_heads = 0;
  int32_t q_lora_rank = 0;  // 0: queries are projected directly (V2-Lite)
  int32_t kv_lora_rank = 0;
  int32_t qk_nope_head_dim = 0;
  int32_t qk_rope_head_dim = 0;
  int32_t v_head_dim = 0;
  int32_t n_routed_experts = 0;  // 0: every layer is dense
  int32_t n_shared_experts = 0;
  int32_t num_experts_per_tok = 0;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  TopkMethod topk_method = TopkMethod::kGreedy;
  double routed_scaling_factor = 1;
  bool norm_topk_prob = false;
  int32_t first_k_dense_replace = 0;
  int32_t moe_layer_freq = 1;
  int32_t max_position_embeddings = 0;
  double rope_theta = 10000;
  std::optional<YarnConfig> yarn;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  std::optional<uint32_t> bos_token_id;
  std::vector<uint32_t> eos_token_ids;

  // Parses the text of a config.json. INVALID_ARGUMENT naming the field, what was expected and found.
  static absl::StatusOr<ModelConfig> Parse(std::string_view json);
  // Reads `directory`/config.json.
  static absl::StatusOr<ModelConfig> Load(const std::string& directory);

  bool IsMoeLayer(int32_t layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  std::vector<int32_t> MoeLayers() const;

  int32_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int32_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }  // cached values per token and layer
  int32_t shared_intermediate_size() const { return n_shared_experts * moe_intermediate_size; }

  // Placement groups: the model's device groups where routing is limited by them, else contiguous runs
  // (docs/placement.md). All experts of a group in a layer live on one server.
  int32_t placement_groups() const;
  ExpertRange GroupExperts(int32_t group) const;
  int32_t GroupOfExpert(int32_t expert) const;
  // Most groups that one token's experts can lie in: its largest fan-out.
  int32_t fan_out_max() const;

  // q·k is multiplied by this: qk_head_dim^-0.5 · m(mscale_all_dim)².
  double softmax_scale() const;
  // Hash of everything that changes results; nodes that disagree refuse each other.
  uint64_t Hash() const;
};

}  // namespace minke
