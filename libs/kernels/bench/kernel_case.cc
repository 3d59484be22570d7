#include "libs/kernels/bench/kernel_case.h"

#include <algorithm>
#include <random>

#include "libs/kernels/cpu/matmul.h"

namespace minke::kernels::bench {

int64_t RotatingSets(int64_t bytes) { return std::max<int64_t>(1, (kRotateBytes + bytes - 1) / bytes); }

void PatternWeights(int64_t begin, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<float>((begin + static_cast<int64_t>(i)) * 17 % 61 - 30) / 61;
}

std::vector<float> RandomFloats(int64_t n) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& v : values) v = normal(rng);
  return values;
}

std::vector<std::byte> RandomActivations(Precision precision, int64_t n) {
  std::vector<std::byte> act(n * ActivationBytes(precision));
  ToActivation(precision, RandomFloats(n).data(), act.data(), n);
  return act;
}

ModelConfig DeepSeekV2Config(int32_t heads) {
  ModelConfig config;
  config.hidden_size = 5120;
  config.moe_intermediate_size = 1536;
  config.num_attention_heads = heads;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  config.n_routed_experts = 160;
  config.num_experts_per_tok = 6;
  config.n_group = 8;
  config.topk_group = 3;
  config.topk_method = TopkMethod::kGroupLimitedGreedy;
  config.routed_scaling_factor = 16;
  config.yarn = YarnConfig{.factor = 40,
                           .original_max_position_embeddings = 4096,
                           .beta_fast = 32,
                           .beta_slow = 1,
                           .mscale = 0.707,
                           .mscale_all_dim = 0.707};
  return config;
}

std::vector<KernelCase> CeilingCases(const CeilingLoops& loops, const Ceilings& ceilings, ThreadPool& pool) {
  std::vector<KernelCase> cases;
  cases.push_back({.name = "ReadBandwidth",
                   .bytes = static_cast<double>(kRotateBytes),
                   .prepare = [&loops, pattern = ceilings.best_read](Workspace& workspace) {
                     auto buffer = std::make_shared<HugeBuffer>(MakeReadBuffer(workspace.pool()));
                     return [&loops, &pool = workspace.pool(), buffer, pattern] {
                       ReadOnce(loops, pattern, *buffer, pool);
                     };
                   }});
  const auto add_flops = [&](const char* name, Precision precision, const CeilingLoops::Flops& loop) {
    cases.push_back({.name = name,
                     .precision = precision,
                     .flops = FlopsOfOneRun(loop, pool),
                     .prepare = [&loop](Workspace& workspace) {
                       return [&loop, &pool = workspace.pool()] { RunFlopsOnce(loop, pool); };
                     }});
  };
  add_flops("FlopsF32", Precision::kExact, loops.f32);
  if (ceilings.bf16_dot) add_flops("FlopsBf16", Precision::kBF16, loops.bf16_dot);
  return cases;
}

}  // namespace minke::kernels::bench
