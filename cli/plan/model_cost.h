// What a model costs: FLOPs, bytes and messages of a token, by part (docs/planner.md derives each). Pure.
#pragma once

#include <cstdint>
#include <string_view>

#include "libs/model/config.h"

namespace minke::cli {

enum class ExpertsFormat { kBF16, kFP8 };

struct ModelCost {
  int layers = 0, moe_layers = 0, dense_layers = 0;
  int experts = 0, experts_per_row = 0, groups = 0;

  // FLOP of one row.
  double attention_flops = 0;   // linears of a layer: queries, latent, absorption, output
  double core_flops = 0;        // absorbed, per token of context, a layer
  double naive_core_flops = 0;  // naive, the same
  double shared_flops = 0;      // shared experts of a layer
  double dense_flops = 0;       // feed-forward of a dense layer
  double gate_flops = 0;        // a layer
  double expert_flops = 0;      // one routed expert
  double head_flops = 0;

  // Weights in memory, bytes; bf16 but for routed experts, which may be fp8.
  double attention_bytes = 0, shared_bytes = 0, dense_bytes = 0;  // a layer
  double expert_bytes = 0;                                        // one routed expert
  double embedding_bytes = 0, head_bytes = 0;
  double unit_bytes = 0;  // all experts of a (layer, group), of the largest group

  double latent_bytes = 0;  // cached per token and layer, bf16
  double row_bytes = 0;     // one row of activations, bf16

  int groups_per_row_max = 0;
  double groups_per_row = 0;  // different groups a row reaches, if it chooses evenly

  double routed_bytes() const { return expert_bytes * experts * moe_layers; }
  // Everything an attention node holds: all but routed experts and gates.
  double attention_node_bytes() const;
  double latent_bytes_per_token() const { return latent_bytes * layers; }
  int64_t units() const { return int64_t{moe_layers} * groups; }
  // The share of a layer's experts that `rows` touch when each chooses evenly.
  double TouchedShare(double rows) const;
};

// REQUIRES: the config has MoE layers.
ModelCost CostOf(const ModelConfig& config, ExpertsFormat format);

// Different servers that a row reaches in a layer whose groups lie on `servers` servers, as evenly as can be,
// if it chooses its groups and the experts within them evenly.
double FanOutOver(const ModelConfig& config, int servers);

}  // namespace minke::cli
