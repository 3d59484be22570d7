// Small checkpoints on disk for unit tests.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "libs/base/dtype.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/model/checkpoint.h"

namespace minke::testing_support {

// config.json of a DeepSeek-V2 small enough to run thousands of times: every feature of V2 is in it.
inline std::string TinyConfigJson() {
  return R"({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 160,
    "routed_scaling_factor": 16.0, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "norm_topk_prob": false, "scoring_func": "softmax", "topk_method": "group_limited_greedy",
    "max_position_embeddings": 2560, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": false,
    "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}})";
}
inline ModelConfig TinyConfig() { return ModelConfig::Parse(TinyConfigJson()).value(); }

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;  // representable in bf16
};

// One tensor of normal values, rounded to bf16, times `scale`.
template <typename Rng>
std::vector<Tensor> SingleTensor(std::string name, std::vector<int64_t> shape, Rng& rng, float scale) {
  int64_t n = 1;
  for (const int64_t dimension : shape) n *= dimension;
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& v : values) v = BF16ToF32(F32ToBF16(normal(rng)));
  return {{std::move(name), std::move(shape), std::move(values)}};
}

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "minke-test-XXXXXX").string();
    MK_CHECK(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// A safetensors file with these BF16 tensors, as text.
inline std::string SafetensorsText(const std::vector<Tensor>& tensors) {
  std::string header = "{", data;
  for (const Tensor& tensor : tensors) {
    const size_t begin = data.size();
    for (const float v : tensor.values) {
      const bf16 bits = F32ToBF16(v);
      data.append(reinterpret_cast<const char*>(&bits), 2);
    }
    StrAppend(&header, header.size() > 1 ? "," : "", "\"", tensor.name, "\":{\"dtype\":\"BF16\",\"shape\":[",
              absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[", begin, ",", data.size(), "]}");
  }
  header += "}";
  const uint64_t bytes = header.size();
  return std::string(reinterpret_cast<const char*>(&bytes), 8) + header + data;
}

// A directory with config.json (tiny) and the given tensors, opened without the check for completeness.
class TempCheckpoint {
 public:
  explicit TempCheckpoint(const std::vector<Tensor>& tensors) {
    WriteFile(dir_.path() + "/config.json", TinyConfigJson());
    WriteFile(dir_.path() + "/model.safetensors", SafetensorsText(tensors));
    checkpoint_ = Checkpoint::OpenUnchecked(dir_.path()).value();
  }
  const Checkpoint& checkpoint() const { return *checkpoint_; }

 private:
  TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

}  // namespace minke::testing_support
