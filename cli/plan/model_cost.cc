#include "cli/plan/model_cost.h"

#include <algorithm>
#include <cmath>

#include "libs/base/status.h"

namespace minke::cli {
namespace {

constexpr double kBF16Bytes = 2;
// e4m3 and a float for each block of 128 x 128 (libs/kernels/cuda/grouped_ffn.h).
constexpr double kFP8Bytes = 1 + 4.0 / (128 * 128);

// C(n - hit, k) / C(n, k): chance that k of n different ones miss `hit` of them.
double ChanceToMiss(double n, double hit, double k) {
  double chance = 1;
  for (int i = 0; i < k; ++i) chance *= std::max(0.0, n - hit - i) / (n - i);
  return chance;
}

// C(n, k), small.
double Choose(int n, int k) {
  if (k < 0 || k > n) return 0;
  double c = 1;
  for (int i = 0; i < k; ++i) c = c * (n - i) / (i + 1);
  return c;
}

// Chance that a row has none of its experts in `held` of the groups.
double ChanceToMissGroups(const ModelConfig& c, int held) {
  const int groups = c.placement_groups(), k = c.num_experts_per_tok;
  const double group_experts = static_cast<double>(c.n_routed_experts) / groups;
  const bool limited = c.topk_method == TopkMethod::kGroupLimitedGreedy && c.n_group > 1;
  const int open = limited ? c.topk_group : groups;  // groups that the row may choose from
  double chance = 0;
  for (int common = 0; common <= std::min(held, open); ++common) {
    const double of_held = Choose(held, common) * Choose(groups - held, open - common) / Choose(groups, open);
    chance += of_held * ChanceToMiss(open * group_experts, common * group_experts, k);
  }
  return chance;
}

}  // namespace

double ModelCost::attention_node_bytes() const {
  return layers * attention_bytes + moe_layers * shared_bytes + dense_layers * dense_bytes + embedding_bytes +
         head_bytes;
}

double ModelCost::TouchedShare(double rows) const {
  return 1 - std::pow(1 - static_cast<double>(experts_per_row) / experts, rows);
}

ModelCost CostOf(const ModelConfig& c, ExpertsFormat format) {
  MK_CHECK(!c.MoeLayers().empty());
  const double hidden = c.hidden_size, heads = c.num_attention_heads;
  const double queries = c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * c.qk_head_dim())
                                           : hidden * heads * c.qk_head_dim();
  const double attention = queries + hidden * c.latent_dim() +
                           c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) +
                           heads * c.v_head_dim * hidden;
  const double shared = 3 * hidden * c.shared_intermediate_size(), dense = 3 * hidden * c.intermediate_size;
  const double expert = 3 * hidden * c.moe_intermediate_size, head = hidden * c.vocab_size;
  ModelCost cost;
  cost.layers = c.num_hidden_layers;
  cost.moe_layers = static_cast<int>(c.MoeLayers().size());
  cost.dense_layers = cost.layers - cost.moe_layers;
  cost.experts = c.n_routed_experts;
  cost.experts_per_row = c.num_experts_per_tok;
  cost.groups = c.placement_groups();
  cost.attention_flops = 2 * attention;
  cost.core_flops = 2 * heads * (c.latent_dim() + c.kv_lora_rank);
  cost.naive_core_flops = 2 * heads * (c.qk_head_dim() + c.v_head_dim);
  cost.shared_flops = 2 * shared;
  cost.dense_flops = 2 * dense;
  cost.gate_flops = 2 * hidden * c.n_routed_experts;
  cost.expert_flops = 2 * expert;
  cost.head_flops = 2 * head;
  cost.attention_bytes = kBF16Bytes * attention;
  cost.shared_bytes = kBF16Bytes * shared;
  cost.dense_bytes = kBF16Bytes * dense;
  cost.expert_bytes = (format == ExpertsFormat::kFP8 ? kFP8Bytes : kBF16Bytes) * expert;
  cost.embedding_bytes = kBF16Bytes * head;
  cost.head_bytes = c.tie_word_embeddings ? 0 : kBF16Bytes * head;
  int largest = 0;
  for (int32_t group = 0; group < cost.groups; ++group)
    largest = std::max(largest, c.GroupExperts(group).size());
  cost.unit_bytes = largest * cost.expert_bytes;
  cost.latent_bytes = kBF16Bytes * c.latent_dim();
  cost.row_bytes = kBF16Bytes * hidden;
  cost.groups_per_row_max = c.fan_out_max();
  cost.groups_per_row = FanOutOver(c, cost.groups);
  return cost;
}

double FanOutOver(const ModelConfig& config, int servers) {
  const int groups = config.placement_groups();
  servers = std::clamp(servers, 1, groups);
  const int more = groups % servers, fewer = groups / servers;  // `more` servers have one group more
  return more * (1 - ChanceToMissGroups(config, fewer + 1)) +
         (servers - more) * (1 - ChanceToMissGroups(config, fewer));
}

}  // namespace minke::cli
