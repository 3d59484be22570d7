#include "libs/cuda_model/whole_model.h"

#include <algorithm>
#include <utility>

#include "libs/base/status.h"

namespace minke::cuda_model {
absl::StatusOr<std::unique_ptr<WholeModel>> WholeModel::Create(const ModelConfig& config,
                                                               WeightSource& source, const Options& options,
                                                               absl::FunctionRef<void(int32_t)> progress) {
  std::unique_ptr<WholeModel> model(new WholeModel());
  MK_RETURN_IF_ERROR(CheckSupported(config));
  {
    MK_ASSIGN_OR_RETURN(const Stream loading, Stream::Create());
    MK_ASSIGN_OR_RETURN(AttentionWeights weights,
                        AttentionWeights::Load(config, source, loading, [](int32_t) {}));
    DeviceBuffer staging;
    for (const int32_t layer : config.MoeLayers()) {
      MK_ASSIGN_OR_RETURN(DeviceBuffer gate, LoadGate(config, layer, source, loading));
      MK_ASSIGN_OR_RETURN(cuda::GroupedFfnWeights experts,
                          LoadExperts(config, layer, {0, config.n_routed_experts}, options.experts, source,
                                      staging, loading));
      model->moe_.emplace(layer, MoeLayer{std::move(gate), std::move(experts)});
      progress(layer);
    }
    MK_RETURN_IF_ERROR(loading.Synchronize());
    MK_ASSIGN_OR_RETURN(model->attention_, AttentionOnGpu::Create(std::move(weights), options.attention));
  }
  MK_RETURN_IF_ERROR(model->Allocate(config, options));
  return model;
}

absl::Status WholeModel::Allocate(const ModelConfig& c, const Options& options) {
  options_ = options;
  const AttentionOnGpu::Options& limits = options.attention;
  if (!options.allowed.empty() && std::ssize(options.allowed) != c.vocab_size) {
    return absl::InvalidArgumentError(
        StrCat("WholeModel: ", options.allowed.size(), " allowed ids of ", c.vocab_size));
  }
  MK_ASSIGN_OR_RETURN(DecodeInputs inputs,
                      DecodeInputs::Create({.buckets = options.buckets,
                                            .rows_max = std::min(limits.rows_max, limits.sequences_max),
                                            .context_max = options.context_max,
                                            .vocab = c.vocab_size,
                                            .scratch_page = attention_->scratch_page()}));
  inputs_ = std::move(inputs);
  MK_ASSIGN_OR_RETURN(batch_, attention_->MakeBatch());
  const int64_t rows = limits.rows_max, k = c.num_experts_per_tok;
  if (!moe_.empty()) {
    cuda::Gate::Options gate;
    gate.experts = c.n_routed_experts;
    gate.hidden = c.hidden_size;
    gate.k = c.num_experts_per_tok;
    gate.groups = c.topk_method == TopkMethod::kGroupLimitedGreedy ? c.n_group : 1;
    gate.topk_groups = c.topk_method == TopkMethod::kGroupLimitedGreedy ? c.topk_group : 1;
    gate.scale = static_cast<float>(c.routed_scaling_factor);
    gate.normalise = c.norm_topk_prob;
    gate.rows_max = rows;
    gate.path = limits.path;
    MK_ASSIGN_OR_RETURN(cuda::Gate made_gate, cuda::Gate::Create(gate));
    gate_ = std::move(made_gate);
    cuda::GroupedFfn::Options ffn;
    ffn.shape = moe_.begin()->second.experts.shape();
    ffn.format = moe_.begin()->second.experts.format();
    ffn.slots = c.num_experts_per_tok;
    ffn.outputs_max = static_cast<int32_t>(rows);
    ffn.path = limits.path;
    MK_ASSIGN_OR_RETURN(cuda::GroupedFfn made_ffn, cuda::GroupedFfn::Create(ffn));
    ffn_ = std::move(made_ffn);
  }
  MK_ASSIGN_OR_RETURN(Stream side, Stream::Create());
  side_ = std::move(side);
  for (auto* event : {&fork_, &join_}) {
    MK_ASSIGN_OR_RETURN(cuda::Event made, cuda::Event::Create());
    *event = std::move(made);
  }
  const int64_t samples = limits.sequences_max;
  const std::pair<DeviceBuffer*, int64_t> buffers[] = {
      {&experts_, rows * k * 4},
      {&weights_, rows * k * 4},
      {&status_, rows},
      {&partial_, rows * c.hidden_size * 2},
      {&allowed_, std::ssize(options.allowed)},
      {&sampling_, samples * int64_t{sizeof(cuda::SampleRow)}},
      {&tokens_, samples * 4}};
  for (const auto& [buffer, bytes] : buffers) {
    MK_ASSIGN_OR_RETURN(*buffer, DeviceBuffer::Allocate(bytes));
  }
  MK_ASSIGN_OR_RETURN(tokens_host_, cuda::PinnedBuffer::Allocate(samples * 4));
  const Stream& stream = attention_->stream();
  if (!options.allowed.empty()) {
    MK_RETURN_IF_ERROR(allowed_.Upload(options.allowed.data(), std::ssize(options.allowed), stream));
  }
  MK_RETURN_IF_ERROR(partial_.Fill(0, stream));
  return stream.Synchronize();
}

absl::Status WholeModel::MixtureOfExperts(int32_t layer, GpuBatch& batch) {
  const Stream& stream = attention_->stream();
  MK_RETURN_IF_ERROR(fork_->Record(stream));
  MK_RETURN_IF_ERROR(cuda::Wait(*side_, *fork_));
  MK_RETURN_IF_ERROR(attention_->FeedForward(layer, batch, *side_));
  MK_RETURN_IF_ERROR(join_->Record(*side_));
  MK_RETURN_IF_ERROR(RoutedExperts(layer, batch));
  MK_RETURN_IF_ERROR(cuda::Wait(stream, *join_));
  batch.pending = partial_.as<bf16>();  // added where x is read next
  return absl::OkStatus();
}

absl::Status WholeModel::RoutedExpertsForBench(GpuBatch& batch) {
  for (const auto& [layer, moe] : moe_) MK_RETURN_IF_ERROR(RoutedExperts(layer, batch));
  return absl::OkStatus();
}

absl::Status WholeModel::RoutedExperts(int32_t layer, GpuBatch& batch) {
  const Stream& stream = attention_->stream();
  const MoeLayer& moe = moe_.at(layer);
  cuda::GateArgs gate;
  gate.x = batch.normed();
  gate.w = moe.gate.as<bf16>();
  gate.rows = batch.rows();
  gate.rows_used = batch.view.rows_used;
  gate.experts = experts_.as<int32_t>();
  gate.weights = weights_.as<float>();
  gate.status = status_.as<uint8_t>();
  MK_RETURN_IF_ERROR(gate_->Run(gate, stream));
  cuda::GroupedFfnArgs ffn;
  ffn.weights = &moe.experts;
  ffn.x = batch.normed();
  ffn.outputs = static_cast<int32_t>(batch.rows());
  ffn.outputs_used = batch.view.rows_used;
  ffn.experts = experts_.as<int32_t>();
  ffn.slot_weights = weights_.as<float>();
  ffn.partial = partial_.as<bf16>();
  return ffn_->Run(ffn, stream);
}

absl::Status WholeModel::Layers(GpuBatch& batch) {
  const ModelConfig& c = attention_->config();
  MK_RETURN_IF_ERROR(attention_->Embed(batch));
  for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    MK_RETURN_IF_ERROR(attention_->Attention(layer, batch));
    if (!c.IsMoeLayer(layer)) {
      MK_RETURN_IF_ERROR(attention_->FeedForward(layer, batch));
      continue;
    }
    MK_RETURN_IF_ERROR(MixtureOfExperts(layer, batch));
    if (observer_) {
      std::vector<int32_t> chosen(batch.rows() * c.num_experts_per_tok);
      MK_RETURN_IF_ERROR(experts_.Download(chosen.data(), std::ssize(chosen) * 4, attention_->stream()));
      MK_RETURN_IF_ERROR(attention_->stream().Synchronize());
      observer_(layer, chosen);
    }
  }
  return absl::OkStatus();
}

absl::Status WholeModel::Sample(const float* logits, const cuda::SampleRow* params, int64_t rows) {
  cuda::SampleArgs args;
  args.logits = logits;
  args.params = params;
  args.allowed = options_.allowed.empty() ? nullptr : allowed_.as<uint8_t>();
  args.tokens = tokens_.as<uint32_t>();
  args.rows = rows;
  args.vocab = attention_->config().vocab_size;
  MK_RETURN_IF_ERROR(cuda::SampleTokens(args, attention_->stream()));
  return tokens_.Download(tokens_host_.as(), rows * 4, attention_->stream());
}

absl::StatusOr<std::vector<uint32_t>> WholeModel::Step(std::span<const GpuChunk> chunks,
                                                       std::span<const cuda::SampleRow> sampling) {
  if (chunks.size() != sampling.size()) return absl::InvalidArgumentError("one sampling row per chunk");
  MK_RETURN_IF_ERROR(attention_->Begin(*batch_, chunks));
  MK_RETURN_IF_ERROR(Layers(*batch_));
  std::vector<int32_t> last;
  int64_t end = 0;
  for (const GpuChunk& chunk : chunks)
    last.push_back(static_cast<int32_t>((end += std::ssize(chunk.tokens)) - 1));
  MK_ASSIGN_OR_RETURN(const float* const logits, attention_->Logits(*batch_, last));
  MK_RETURN_IF_ERROR(sampling_.Upload(
      sampling.data(), std::ssize(sampling) * int64_t{sizeof(cuda::SampleRow)}, attention_->stream()));
  MK_RETURN_IF_ERROR(Sample(logits, sampling_.as<cuda::SampleRow>(), std::ssize(chunks)));
  MK_RETURN_IF_ERROR(attention_->stream().Synchronize());
  const uint32_t* tokens = tokens_host_.as<uint32_t>();
  return std::vector<uint32_t>(tokens, tokens + chunks.size());
}

absl::Status WholeModel::DecodeLaunches(int32_t bucket) {
  MK_RETURN_IF_ERROR(inputs_->Upload(bucket, attention_->stream()));
  MK_RETURN_IF_ERROR(Layers(*batch_));
  MK_ASSIGN_OR_RETURN(const float* const logits, attention_->Logits(*batch_, nullptr, bucket));
  return Sample(logits, inputs_->sampling(bucket), bucket);
}

absl::StatusOr<std::span<const uint32_t>> WholeModel::Decode(std::span<const DecodeInput> inputs, Form form) {
  if (inputs.empty()) return std::span<const uint32_t>();
  MK_ASSIGN_OR_RETURN(const int32_t bucket, inputs_->BucketOf(inputs));
  const Observer observer = std::exchange(observer_, nullptr);  // it would wait, and a graph cannot
  const auto run = [&]() -> absl::Status {
    const auto begin = [&](std::span<const DecodeInput> rows) {
      inputs_->Write(rows, bucket);
      return attention_->BeginDecode(*batch_, inputs_->View(bucket), inputs_->sequences());
    };
    if (form == Form::kLaunches) {
      MK_RETURN_IF_ERROR(begin(inputs));
      return DecodeLaunches(bucket);
    }
    auto graph = graphs_.find(bucket);
    if (graph == graphs_.end()) {
      // Once without a graph, and with padding only, so that modules are loaded and algorithms chosen.
      MK_RETURN_IF_ERROR(begin({}));
      MK_RETURN_IF_ERROR(DecodeLaunches(bucket));
      MK_RETURN_IF_ERROR(attention_->stream().Synchronize());
      MK_ASSIGN_OR_RETURN(cuda::Graph made,
                          cuda::Graph::Capture(attention_->stream(), [&] { return DecodeLaunches(bucket); }));
      graph = graphs_.emplace(bucket, std::move(made)).first;
    }
    MK_RETURN_IF_ERROR(begin(inputs));
    return graph->second.Launch(attention_->stream());
  };
  const absl::Status ran = run();
  observer_ = observer;
  MK_RETURN_IF_ERROR(ran);
  MK_RETURN_IF_ERROR(attention_->stream().Synchronize());
  return std::span<const uint32_t>(tokens_host_.as<uint32_t>(), inputs.size());
}

}  // namespace minke::cuda_model
