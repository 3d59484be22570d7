// config.json. What is accepted is a shape that everything else can count with.
#include <cmath>

#include "libs/model/config.h"
#include "libs/model/tensors.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  const auto parsed = minke::ModelConfig::Parse({reinterpret_cast<const char*>(data), bytes});
  if (!parsed.ok()) {
    FUZZ_ASSERT(!parsed.status().message().empty());
    return 0;
  }
  const minke::ModelConfig& c = *parsed;
  FUZZ_ASSERT(c.vocab_size > 0 && c.hidden_size > 0 && c.num_hidden_layers > 0 && c.num_attention_heads > 0);
  FUZZ_ASSERT(c.qk_rope_head_dim % 2 == 0);
  for (const uint32_t id : c.eos_token_ids) FUZZ_ASSERT(id < static_cast<uint32_t>(c.vocab_size));
  (void)c.Hash();
  (void)c.softmax_scale();
  if (c.n_routed_experts == 0) return 0;
  FUZZ_ASSERT(c.num_experts_per_tok >= 1 && c.num_experts_per_tok <= c.n_routed_experts);
  FUZZ_ASSERT(c.fan_out_max() >= 1 && c.fan_out_max() <= c.placement_groups());
  int32_t end = 0;
  for (int32_t group = 0; group < c.placement_groups(); ++group) {
    const minke::ExpertRange range = c.GroupExperts(group);
    FUZZ_ASSERT(range.begin == end && range.size() >= 1);
    FUZZ_ASSERT(c.GroupOfExpert(range.begin) == group && c.GroupOfExpert(range.end - 1) == group);
    end = range.end;
  }
  FUZZ_ASSERT(end == c.n_routed_experts);
  // Bounded work: a name for every tensor that there should be.
  FUZZ_ASSERT(int64_t{c.num_hidden_layers} * c.n_routed_experts <= int64_t{1} << 20);
  for (const int32_t layer : c.MoeLayers()) FUZZ_ASSERT(layer >= 0 && layer < c.num_hidden_layers);
  return 0;
}
