#include "bench/gpu/model_cases.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "bench/gpu/fill.h"
#include "bench/gpu/measure.h"
#include "bench/gpu/random_model.h"
#include "libs/base/status.h"
#include "libs/cuda_model/whole_model.h"
#include "libs/kernels/cuda/gate.h"
#include "libs/kernels/cuda/sampling.h"

namespace minke::bench {
namespace {

using cuda::DeviceBuffer;
using cuda::Stream;
using cuda_model::AttentionOnGpu;
using cuda_model::WholeModel;

absl::StatusOr<DeviceBuffer> Random(int64_t count, uint32_t seed, float deviation, const Stream& stream) {
  MK_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Allocate(count * 2));
  MK_RETURN_IF_ERROR(FillNormal(buffer.as<bf16>(), count, seed, deviation, stream));
  return buffer;
}

absl::Status RunGate(const ModelCalls& calls, const std::string& work, int rows, bool v2, double target_ms,
                     const Stream& stream) {
  const int64_t hidden = v2 ? 5120 : 2048, experts = v2 ? 160 : 64;
  const int sets = Sets(rows * hidden * 2);
  MK_ASSIGN_OR_RETURN(const DeviceBuffer x, Random(sets * rows * hidden, 1, 1, stream));
  MK_ASSIGN_OR_RETURN(const DeviceBuffer w, Random(experts * hidden, 2, 4 / std::sqrt(5120.f), stream));
  MK_ASSIGN_OR_RETURN(const DeviceBuffer out, DeviceBuffer::Allocate(rows * (6 * 8 + 1)));
  cuda::Gate::Options options;
  options.experts = static_cast<int32_t>(experts);
  options.hidden = static_cast<int32_t>(hidden);
  options.k = 6;
  options.groups = v2 ? 8 : 1;
  options.topk_groups = v2 ? 3 : 1;
  options.rows_max = rows;
  MK_ASSIGN_OR_RETURN(cuda::Gate gate, cuda::Gate::Create(options));
  MK_ASSIGN_OR_RETURN(const double ms, MedianMilliseconds(sets, stream, [&](int set) {
                        cuda::GateArgs args;
                        args.x = x.as<bf16>() + set * rows * hidden;
                        args.w = w.as<bf16>();
                        args.rows = rows;
                        args.experts = out.as<int32_t>();
                        args.weights = out.as<float>() + rows * 6;
                        args.status = out.as<uint8_t>() + rows * 48;
                        return gate.Run(args, stream);
                      }));
  calls.report({work, ms, 2.0 * rows * hidden * experts, (rows + experts) * hidden * 2.0, target_ms});
  return absl::OkStatus();
}

absl::Status RunSampling(const ModelCalls& calls, const std::string& work, int rows, float temperature,
                         const Stream& stream) {
  constexpr int64_t kVocab = 102400;
  std::vector<float> logits(rows * kVocab);
  uint32_t state = 1;
  for (float& v : logits) {  // the sum of four uniforms is near enough to normal
    v = -6;
    for (int i = 0; i < 4; ++i)
      v += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * (3.f / (1 << 24));
  }
  std::vector<cuda::SampleRow> params(rows);
  for (int r = 0; r < rows; ++r)
    params[r] = {.seed = 7u + r, .position = r, .temperature = temperature, .top_p = 0.95f};
  MK_ASSIGN_OR_RETURN(DeviceBuffer logits_device, DeviceBuffer::Allocate(rows * kVocab * 4));
  MK_ASSIGN_OR_RETURN(DeviceBuffer params_device, DeviceBuffer::Allocate(rows * 32));
  MK_ASSIGN_OR_RETURN(const DeviceBuffer tokens, DeviceBuffer::Allocate(rows * 4));
  MK_RETURN_IF_ERROR(logits_device.Upload(logits.data(), logits_device.bytes(), stream));
  MK_RETURN_IF_ERROR(params_device.Upload(params.data(), params_device.bytes(), stream));
  MK_RETURN_IF_ERROR(stream.Synchronize());
  MK_ASSIGN_OR_RETURN(const double ms, MedianMilliseconds(1, stream, [&](int) {
                        cuda::SampleArgs args;
                        args.logits = logits_device.as<float>();
                        args.params = params_device.as<cuda::SampleRow>();
                        args.tokens = tokens.as<uint32_t>();
                        args.rows = rows;
                        args.vocab = kVocab;
                        return cuda::SampleTokens(args, stream);
                      }));
  calls.report({work, ms, 0, rows * kVocab * 4.0, 0});
  return absl::OkStatus();
}

// Milliseconds of what `body` launches, as one graph.
absl::StatusOr<double> GraphMilliseconds(const Stream& stream, absl::FunctionRef<absl::Status()> body) {
  MK_RETURN_IF_ERROR(body());
  MK_RETURN_IF_ERROR(stream.Synchronize());
  MK_ASSIGN_OR_RETURN(const cuda::Graph graph, cuda::Graph::Capture(stream, body));
  return MedianMilliseconds(1, stream, [&](int) { return graph.Launch(stream); });
}

double AttentionBytes(const ModelConfig& c, int batch, int64_t context) {  // of one layer
  const double hidden = c.hidden_size, heads = c.num_attention_heads, qk = c.qk_head_dim();
  const double q = c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * qk) : hidden * heads * qk;
  const double kv = c.latent_dim() * hidden + heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank;
  return 2 * (q + kv + heads * c.v_head_dim * hidden) + 2.0 * batch * context * c.latent_dim();
}

absl::Status RunLite(const ModelCalls& calls, const Stream& stream) {
  constexpr int64_t kContext = 512, kSteps = 16;
  constexpr int kBatchMax = 512, kPrompt = 4096;
  const ModelConfig c = ShapeOf(false, 27);
  const int64_t pages_each = (kContext + 2 * kSteps + 63) / 64 + 1;
  WholeModel::Options options;
  options.attention.rows_max = kPrompt;
  options.attention.cache_pages = kBatchMax * pages_each;
  options.attention.prefill_keys_max = kPrompt;
  options.context_max = 64 * pages_each;
  RandomSource source;
  MK_ASSIGN_OR_RETURN(std::unique_ptr<WholeModel> model,
                      WholeModel::Create(c, source, options, [](int32_t) {}));
  MK_RETURN_IF_ERROR(FillCache(model->attention()));
  for (const int chunk : {512, 4096}) {  // prompts, kernel by kernel
    std::vector<uint32_t> tokens(chunk);
    for (int i = 0; i < chunk; ++i) tokens[i] = static_cast<uint32_t>((i * 7919 + 13) % c.vocab_size);
    const auto pages = ScatteredPages(1, kPrompt / 64);
    std::vector<double> times;
    for (int run = -2; run < 6; ++run) {
      const cuda_model::GpuChunk all = {tokens, 0, pages[0]};
      const auto begin = std::chrono::steady_clock::now();
      MK_RETURN_IF_ERROR(model->Step({&all, 1}, std::vector<cuda::SampleRow>(1)).status());
      const auto end = std::chrono::steady_clock::now();
      if (run >= 0) times.push_back(std::chrono::duration<double, std::milli>(end - begin).count());
    }
    std::sort(times.begin(), times.end());
    char work[96];
    std::snprintf(work, sizeof(work), "V2-Lite prompt of %d: %.0f tok/s", chunk, chunk / times[3] * 1e3);
    const double pairs = 0.5 * chunk * chunk * c.num_attention_heads * (192 + 128) * 2 * 27;
    calls.report({work, times[3], chunk * (4.9e9 - 2.0 * c.vocab_size * c.hidden_size) + pairs, 31e9, 0});
  }
  const double targets[] = {300, 2800, 9500, 25000};
  const int batches[] = {1, 32, 128, 512};
  for (int at = 0; at < 4; ++at) {
    const int batch = batches[at];
    const auto pages = ScatteredPages(batch, pages_each);
    std::vector<cuda_model::DecodeInput> inputs(batch);
    for (int i = 0; i < batch; ++i) {
      inputs[i] = {static_cast<uint32_t>((i * 7919 + 13) % c.vocab_size), kContext - 1, pages[i], {}};
    }
    std::vector<double> times;
    for (int64_t step = -4; step < kSteps; ++step) {
      const auto begin = std::chrono::steady_clock::now();
      MK_ASSIGN_OR_RETURN(const auto tokens, model->Decode(inputs));
      const auto end = std::chrono::steady_clock::now();
      if (step >= 0) times.push_back(std::chrono::duration<double, std::milli>(end - begin).count());
      for (int i = 0; i < batch; ++i) {
        if (tokens[i] == cuda::kNoToken) return absl::InternalError("a row without a token");
        inputs[i].token = tokens[i];
        inputs[i].position++;
      }
    }
    std::sort(times.begin(), times.end());
    const double ms = times[kSteps / 2];
    const double touched = c.n_routed_experts * (1 - std::pow(1 - 6.0 / c.n_routed_experts, batch));
    const double bytes = 27 * AttentionBytes(c, batch, kContext) + 6.0 * c.hidden_size * 10944 +
                         26 * 6.0 * c.hidden_size * c.moe_intermediate_size * (touched + 2) +
                         2.0 * c.vocab_size * c.hidden_size;
    char work[96];
    std::snprintf(work, sizeof(work), "V2-Lite decode, B=%d: %.0f tok/s, limit %.0f", batch, batch / ms * 1e3,
                  batch / bytes * calls.copy_gbps * 1e9);
    calls.report({work, ms, batch * 4.9e9, bytes, batch / targets[at] * 1e3});

    // Where it goes: the parts as graphs of their own.
    AttentionOnGpu& attention = model->attention();
    MK_ASSIGN_OR_RETURN(const auto rows, DecodingBatch(attention, batch, kContext, pages));
    const auto part = [&](const char* name, double part_bytes, auto body) -> absl::Status {
      MK_ASSIGN_OR_RETURN(const double part_ms, GraphMilliseconds(attention.stream(), body));
      calls.report({std::string("  ") + name, part_ms, 0, part_bytes, 0});
      return absl::OkStatus();
    };
    MK_RETURN_IF_ERROR(part("26 x attention", 26 * AttentionBytes(c, batch, kContext), [&]() -> absl::Status {
      for (int32_t layer = 1; layer < 27; ++layer) MK_RETURN_IF_ERROR(attention.Attention(layer, *rows));
      return absl::OkStatus();
    }));
    MK_RETURN_IF_ERROR(part("26 x shared experts", 26 * 12.0 * c.hidden_size * c.moe_intermediate_size,
                            [&]() -> absl::Status {
                              for (int32_t layer = 1; layer < 27; ++layer) {
                                MK_RETURN_IF_ERROR(attention.FeedForward(layer, *rows));
                              }
                              return absl::OkStatus();
                            }));
    MK_RETURN_IF_ERROR(part("logits", 2.0 * c.vocab_size * c.hidden_size, [&]() -> absl::Status {
      return attention.Logits(*rows, nullptr, batch).status();
    }));
    MK_RETURN_IF_ERROR(part("26 x gate and routed experts",
                            26 * 6.0 * c.hidden_size * c.moe_intermediate_size * touched,
                            [&]() -> absl::Status { return model->RoutedExpertsForBench(*rows); }));
  }
  return stream.Synchronize();
}

constexpr int kV2Layers = 4;  // the first is dense; the others are measured

absl::Status RunV2Attention(const ModelCalls& calls, const std::string& work, int batch,
                            const Stream& stream) {
  constexpr int64_t kContext = 4096, kPagesEach = kContext / 64 + 1;
  const ModelConfig c = ShapeOf(true, kV2Layers);
  RandomSource source;
  MK_ASSIGN_OR_RETURN(cuda_model::AttentionWeights weights,
                      cuda_model::AttentionWeights::Load(c, source, stream, [](int32_t) {}));
  AttentionOnGpu::Options options;
  options.rows_max = batch;
  options.sequences_max = batch;
  options.cache_pages = batch * kPagesEach;
  options.prefill_keys_max = 1024;
  MK_ASSIGN_OR_RETURN(std::unique_ptr<AttentionOnGpu> attention,
                      AttentionOnGpu::Create(std::move(weights), options));
  MK_RETURN_IF_ERROR(FillCache(*attention));
  MK_ASSIGN_OR_RETURN(const auto rows,
                      DecodingBatch(*attention, batch, kContext, ScatteredPages(batch, kPagesEach)));
  MK_ASSIGN_OR_RETURN(const double ms, GraphMilliseconds(attention->stream(), [&]() -> absl::Status {
                        for (int32_t layer = 1; layer < kV2Layers; ++layer) {
                          MK_RETURN_IF_ERROR(attention->Attention(layer, *rows));
                          MK_RETURN_IF_ERROR(attention->FeedForward(layer, *rows));
                        }
                        return absl::OkStatus();
                      }));
  const double shared = 12.0 * c.hidden_size * c.moe_intermediate_size;
  const double core = 2.0 * batch * kContext * c.num_attention_heads * (576 + 512);
  const double linear = 2.0 * batch * (AttentionBytes(c, 0, 0) + shared) / 2;
  calls.report({work, ms / (kV2Layers - 1), core + linear, AttentionBytes(c, batch, kContext) + shared, 0});
  return absl::OkStatus();
}

absl::Status RunV2Experts(const ModelCalls& calls, const Stream& stream) {
  const ModelConfig c = ShapeOf(true, kV2Layers);
  RandomSource source;
  // One of 8 groups: 20 experts; a row that comes has two of them on average (6 choices in 3 groups).
  std::vector<cuda::GroupedFfnWeights> layers;
  DeviceBuffer staging;
  for (int32_t layer = 1; layer < kV2Layers; ++layer) {
    MK_ASSIGN_OR_RETURN(
        cuda::GroupedFfnWeights weights,
        cuda_model::LoadExperts(c, layer, {0, 20}, cuda::FfnFormat::kBF16, source, staging, stream));
    layers.push_back(std::move(weights));
  }
  for (const int rows : {48, 384, 1837}) {  // of 128, 1,024 and 4,899 in the cluster
    cuda::GroupedFfn::Options options;
    options.shape = layers[0].shape();
    options.slots = 6;
    options.outputs_max = rows;
    MK_ASSIGN_OR_RETURN(cuda::GroupedFfn ffn, cuda::GroupedFfn::Create(options));
    MK_ASSIGN_OR_RETURN(const DeviceBuffer x, Random(int64_t{rows} * c.hidden_size, 5, 1, stream));
    MK_ASSIGN_OR_RETURN(const DeviceBuffer partial,
                        DeviceBuffer::Allocate(int64_t{rows} * c.hidden_size * 2));
    std::vector<int32_t> experts(rows * 6, -1);
    std::vector<float> slot_weights(rows * 6, 0.5f);
    uint32_t state = 3;
    for (int r = 0; r < rows; ++r) {
      state = state * 1664525u + 1013904223u;
      experts[r * 6] = static_cast<int32_t>((state >> 8) % 20);
      experts[r * 6 + 1] = static_cast<int32_t>((experts[r * 6] + 1 + (state >> 20) % 19) % 20);
    }
    MK_ASSIGN_OR_RETURN(DeviceBuffer experts_device, DeviceBuffer::Allocate(rows * 24));
    MK_ASSIGN_OR_RETURN(DeviceBuffer weights_device, DeviceBuffer::Allocate(rows * 24));
    MK_RETURN_IF_ERROR(experts_device.Upload(experts.data(), rows * 24, stream));
    MK_RETURN_IF_ERROR(weights_device.Upload(slot_weights.data(), rows * 24, stream));
    MK_RETURN_IF_ERROR(stream.Synchronize());
    MK_ASSIGN_OR_RETURN(const double ms, GraphMilliseconds(stream, [&]() -> absl::Status {
                          for (const auto& layer : layers) {
                            cuda::GroupedFfnArgs args;
                            args.weights = &layer;
                            args.x = x.as<bf16>();
                            args.outputs = rows;
                            args.experts = experts_device.as<int32_t>();
                            args.slot_weights = weights_device.as<float>();
                            args.partial = partial.as<bf16>();
                            MK_RETURN_IF_ERROR(ffn.Run(args, stream));
                          }
                          return absl::OkStatus();
                        }));
    const double expert = 3.0 * c.hidden_size * c.moe_intermediate_size;
    calls.report({"V2 expert server, a layer, rows " + std::to_string(rows), ms / (kV2Layers - 1),
                  2 * expert * rows * 2, 20 * expert * 2, 0});
  }
  return absl::OkStatus();
}

}  // namespace

void RunModelCases(const ModelCalls& calls, const Stream& stream) {
  const auto run = [&](const std::string& work, auto body) {
    if (!calls.wanted(work)) return;
    if (const absl::Status status = body(work); !status.ok()) calls.fail(work, status);
  };
  for (const int rows : {1, 64, 512, 4096}) {
    run("gate, 160 experts, hidden 5120, rows " + std::to_string(rows), [&](const std::string& work) {
      return RunGate(calls, work, rows, true, rows == 4096 ? 0.040 : 0, stream);
    });
  }
  for (const int rows : {1, 128, 512}) {
    run("gate, 64 experts, hidden 2048, rows " + std::to_string(rows),
        [&](const std::string& work) { return RunGate(calls, work, rows, false, 0, stream); });
  }
  for (const int rows : {1, 128}) {
    for (const float temperature : {0.f, 1.f}) {
      run("sampling of " + std::to_string(rows) + (temperature > 0 ? ", top-p 0.95" : ", greedy"),
          [&](const std::string& work) { return RunSampling(calls, work, rows, temperature, stream); });
    }
  }
  run("V2-Lite decode", [&](const std::string&) { return RunLite(calls, stream); });
  for (const int batch : {1, 16, 128}) {
    run("V2 attention node, a layer, B=" + std::to_string(batch) + ", context 4096",
        [&](const std::string& work) { return RunV2Attention(calls, work, batch, stream); });
  }
  run("V2 expert server", [&](const std::string&) { return RunV2Experts(calls, stream); });
}

}  // namespace minke::bench
