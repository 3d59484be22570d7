// What an expert server's launch costs beside its kernels: V2's widths and one group of 20 experts, through
// the backend that minke-expert uses: from messages in host memory to sums in host memory, and from rows in
// GPU memory to sums there. Makes a checkpoint of 1.9 GB for it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>

#include "libs/gpu_rows/gpu_rows.h"
#include "libs/kernels/cuda/device.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "services/experts/compute/expert_backend.h"

namespace minke::experts {
namespace {

constexpr int kExperts = 20, kHidden = 5120;

// 40 experts in two groups, nothing else of any size.
constexpr char kConfig[] =
    R"({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
    "vocab_size": 64, "hidden_size": 5120, "intermediate_size": 64, "moe_intermediate_size": 1536,
    "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "n_shared_experts": 1,
    "n_routed_experts": 40, "routed_scaling_factor": 16.0, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "qk_nope_head_dim": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": false, "scoring_func": "softmax",
    "topk_method": "group_limited_greedy", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "tie_word_embeddings": false, "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1, "rope_scaling": null})";

double Milliseconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

void Measure(const Checkpoint& checkpoint, ExpertsFormat format, ThreadPool& pool, ThreadPool& load_pool) {
  const char* name = format == ExpertsFormat::kFP8 ? "fp8" : "bf16";
  constexpr int kBlockRows = 2048, kBlocks = 8;  // one of rows, one of sums, and those that the backend keeps
  const auto memory = MakeGpuRowMemory(kHidden * 2, kBlockRows, kBlocks).value();
  auto backend = MakeBackend(checkpoint, {.device = Device::kCuda, .format = format, .rows = memory.get()},
                             pool, load_pool)
                     .value();
  Units units;
  const double load_ms = Milliseconds([&] { units[{1, 0}] = backend->LoadUnit({1, 0}).value(); });
  const double again_ms = Milliseconds([&] { (void)backend->LoadUnit({1, 0}).value(); });
  std::printf("%-5s a unit: %.0f MB, loaded in %.0f ms, again in %.0f ms\n", name,
              static_cast<double>(units[{1, 0}]->bytes()) / 1e6, load_ms, again_ms);
  std::mt19937 rng(1);
  for (const int rows : {1, 48, 384, 1837}) {  // two pairs each
    std::vector<bf16> data(int64_t{rows} * kHidden);
    for (bf16& v : data) v = static_cast<bf16>(0x3f80 | (rng() & 0x807f));
    std::vector<wire::WorkRow> work(rows);
    std::vector<wire::WorkPair> pairs;
    for (int r = 0; r < rows; ++r) {
      work[r].row = r;
      work[r].set_pairs(2 * r, 2);
      const int first = rng() % (kExperts - 1);
      pairs.push_back({.weight = .5f, .expert = static_cast<uint16_t>(first)});
      pairs.push_back(
          {.weight = .5f, .expert = static_cast<uint16_t>(first + 1 + rng() % (kExperts - 1 - first))});
    }
    const LaunchJob job{
        .view = {.rows = work, .pairs = pairs, .data = reinterpret_cast<std::byte*>(data.data())}};
    std::vector<GroupRow> hosted, missing;
    SplitByGroup(checkpoint.config(), units, 1, 0, job.view, hosted, missing);
    std::vector<bf16> sums(data.size());
    std::vector<SumTarget> outs;
    for (int r = 0; r < rows; ++r)
      outs.push_back({reinterpret_cast<std::byte*>(&sums[int64_t{r} * kHidden])});
    std::vector<uint8_t> finite(rows);
    const auto measure = [&](const char* where, const LaunchJob& from, std::span<const SumTarget> to) {
      std::vector<double> ms;
      for (int i = 0; i < 60; ++i) {
        ms.push_back(Milliseconds([&] {
          MK_CHECK(backend->Run(units, 1, {&from, 1}, hosted, to, finite).ok());
        }));
      }
      ms.erase(ms.begin(), ms.begin() + 10);
      std::sort(ms.begin(), ms.end());
      std::printf("%-5s %5d rows, %4.1f MB each way, in %s memory: %7.0f us (median of 50; best %.0f)\n",
                  name, rows, static_cast<double>(data.size()) * 2e-6, where, ms[ms.size() / 2] * 1e3,
                  ms.front() * 1e3);
    };
    measure("host", job, outs);
    std::byte *const in = memory->TakeBlock(), *const out = memory->TakeBlock();
    MK_CHECK(in != nullptr && out != nullptr);
    std::vector<transport::RowCopy> copies;
    for (int r = 0; r < rows; ++r)
      copies.push_back({in + r * memory->row_bytes(), job.view.data + r * memory->row_bytes(), true});
    MK_CHECK(memory->CopyRows(copies).ok());
    LaunchJob there = job;
    there.view.data = in;
    there.in_row_memory = true;
    std::vector<SumTarget> sums_there;
    for (int r = 0; r < rows; ++r) sums_there.push_back({out + r * memory->row_bytes(), true});
    measure("GPU", there, sums_there);
    memory->ReturnBlock(in);
    memory->ReturnBlock(out);
  }
}

int Main() {
  const auto device = cuda::CurrentDevice();
  if (!device.ok()) {
    std::printf("no CUDA device: %s\nNothing was measured.\n",
                std::string(device.status().message()).c_str());
    return 77;
  }
  const int threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 16u));
  std::printf("device: %s, %d threads\n", device->name.c_str(), threads);
  const minke::testing_support::TempDir dir;
  const absl::Status made =
      MakeCheckpoint({.directory = dir.path() + "/model", .config_json = kConfig, .threads = threads});
  MK_CHECK(made.ok());
  const auto checkpoint = Checkpoint::Open(dir.path() + "/model").value();
  ThreadPool pool(threads), load_pool(1);
  for (const ExpertsFormat format : {ExpertsFormat::kBF16, ExpertsFormat::kFP8}) {
    Measure(*checkpoint, format, pool, load_pool);
  }
  return 0;
}

}  // namespace
}  // namespace minke::experts

int main() { return minke::experts::Main(); }
