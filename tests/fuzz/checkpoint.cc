// A checkpoint from anywhere. Parts: config.json (empty: a good one), model.safetensors.index.json (empty:
// none), a.safetensors or, without index, model.safetensors, then b.safetensors. Every tensor that is handed
// out lies in its file, and its shape says as many bytes as it has.
#include "libs/model/checkpoint.h"

#include <vector>

#include "tests/fuzz/fuzz.h"

namespace {

constexpr std::string_view kConfig =
    R"({"model_type": "deepseek_v2", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
        "moe_intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
        "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using minke::fuzz::kPart;
  static const minke::fuzz::Folder folder;
  minke::fuzz::Input input(data, bytes);
  const std::string_view config = input.TakeUntil(kPart), index = input.TakeUntil(kPart);
  const std::string_view first = input.TakeUntil(kPart), second = input.rest();
  folder.Write("config.json", config.empty() ? kConfig : config);
  folder.Write("model.safetensors.index.json", index.empty() ? std::string_view() : index);
  folder.Write(index.empty() ? "model.safetensors" : "a.safetensors", first);
  folder.Write("b.safetensors", second);
  const auto opened = minke::Checkpoint::OpenUnchecked(folder.path());
  if (!opened.ok()) {
    FUZZ_ASSERT(!opened.status().message().empty());
    return 0;
  }
  const minke::Checkpoint& checkpoint = **opened;
  (void)checkpoint.Problems();
  (void)checkpoint.fingerprint();
  for (const auto& [name, view] : checkpoint.tensors()) {
    int64_t elements = 1;
    for (const int64_t dimension : view.shape) {
      FUZZ_ASSERT(dimension >= 0);
      elements *= dimension;
    }
    FUZZ_ASSERT(view.elements() == elements && view.bytes() == elements * DTypeBytes(view.dtype));
    FUZZ_ASSERT(view.bytes() <= static_cast<int64_t>(bytes));
    std::vector<float> values(static_cast<size_t>(elements));
    view.Read(0, values);
    FUZZ_ASSERT(checkpoint.Find(name, view.shape).ok());
    checkpoint.Release(view);
  }
  return 0;
}
