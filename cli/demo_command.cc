#include "cli/demo_command.h"

#include <filesystem>
#include <iostream>
#include <mutex>

#include "absl/cleanup/cleanup.h"
#include "cli/chat_command.h"
#include "cli/up_command.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/model/make_checkpoint.h"
#include "libs/tokenizer/byte_level_files.h"

namespace minke::cli {
namespace {

// Every feature of DeepSeek-V2 in 3.7 M parameters: YaRN, query compression, 160 experts in 8 groups, 2
// shared.
constexpr char kDemoConfig[] = R"({
  "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
  "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 32,
  "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
  "n_shared_experts": 2, "n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
  "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": false,
  "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "moe_layer_freq": 1,
  "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
  "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": false,
  "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
  "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 32,
                   "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}})";

struct Scene {
  std::string about, prompt;
  float temperature = 0.7f;
  bool echo = false;  // show the prompt as the text's beginning
};

absl::Status Show(const std::string& checkpoint, int port, const Scene& scene) {
  UpFlags up;
  up.checkpoint = checkpoint;
  up.port = port;
  return RunUp(up, [scene](const std::string& url) {
    std::cout << "\n" << scene.about << "\n\n" << (scene.echo ? scene.prompt : "") << std::flush;
    ChatFlags chat;
    chat.url = url;
    chat.max_tokens = 200;
    chat.temperature = scene.temperature;
    const absl::Status status = StreamCompletion(chat, scene.prompt, std::cout);
    if (!status.ok()) std::cout << "failed: " << status.message();
    std::cout << "\n\nServing at " << url << " until Ctrl-C. Try:\n\n  curl " << url
              << "/v1/completions -H 'content-type: application/json' \\\n    -d '{\"prompt\": \""
              << scene.prompt << "\", \"max_tokens\": 64}'\n\n"
              << std::flush;
  });
}

}  // namespace

absl::Status RunDemo(const DemoFlags& flags) {
  if (!flags.checkpoint.empty()) {
    return Show(flags.checkpoint, flags.port,
                {.about = "A completion, streamed through gateway, attention, router and experts:",
                 .prompt = "ROMEO:",
                 .temperature = 0.7f,
                 .echo = true});
  }
  std::string root = (std::filesystem::temp_directory_path() / "minke-demo-XXXXXX").string();
  if (::mkdtemp(root.data()) == nullptr) return absl::UnavailableError(StrCat("cannot make ", root));
  const absl::Cleanup remove = [&] {
    std::error_code ignored;
    std::filesystem::remove_all(root, ignored);
  };
  const std::string checkpoint = root + "/minke-random";
  MK_RETURN_IF_ERROR(MakeCheckpoint({.directory = checkpoint, .config_json = kDemoConfig, .seed = 1}));
  MK_RETURN_IF_ERROR(
      tokenizer::WriteByteLevelTokenizer(checkpoint, {.vocab_size = 512, .bos_id = 0, .eos_id = 1}));
  return Show(
      checkpoint, flags.port,
      {.about = "A completion of random weights (it cannot make sense), streamed through gateway, attention, "
                "router and experts:",
       .prompt = "Whales ",
       .temperature = 1.0f,
       .echo = false});
}

}  // namespace minke::cli
