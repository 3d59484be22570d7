#include "libs/cuda_model/whole_model.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "libs/base/status.h"
#include "libs/kernels/cpu/mla.h"

namespace minke::cuda_model {
namespace {

constexpr int64_t kPageTokens = kernels::kPageTokens;

int64_t Aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

WholeModel::InputLayout::InputLayout(int64_t rows, int64_t stride)
    : tokens(0),
      positions(Aligned(rows * 4)),
      pages(positions + Aligned(rows * 4)),
      sequences(pages + Aligned(rows * 4)),
      sampling(sequences + Aligned(rows * 4)),
      used(sampling + rows * static_cast<int64_t>(sizeof(cuda::SampleRow))),
      page_table(used + 16),
      bytes(page_table + rows * stride * 4) {}

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
  std::erase_if(options_.buckets,
                [&](int32_t b) { return b < 1 || b > std::min(limits.rows_max, limits.sequences_max); });
  if (options_.buckets.empty() || !std::is_sorted(options_.buckets.begin(), options_.buckets.end()) ||
      options.context_max < 1 || (!options.allowed.empty() && std::ssize(options.allowed) != c.vocab_size)) {
    return absl::InvalidArgumentError(StrCat("WholeModel: ", options_.buckets.size(), " buckets, context ",
                                             options.context_max, ", ", options.allowed.size(),
                                             " allowed ids"));
  }
  MK_ASSIGN_OR_RETURN(batch_, attention_->MakeBatch());
  const int64_t rows = limits.rows_max, k = c.num_experts_per_tok, buckets_max = options_.buckets.back();
  stride_ = (options.context_max + kPageTokens - 1) / kPageTokens;
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
  const InputLayout layout(buckets_max, stride_);
  const int64_t samples = std::max(limits.sequences_max, buckets_max);
  const std::pair<DeviceBuffer*, int64_t> buffers[] = {
      {&experts_, rows * k * 4},
      {&weights_, rows * k * 4},
      {&status_, rows},
      {&partial_, rows * c.hidden_size * 2},
      {&allowed_, std::ssize(options.allowed)},
      {&sampling_, samples * int64_t{sizeof(cuda::SampleRow)}},
      {&tokens_, samples * 4},
      {&inputs_, layout.bytes}};
  for (const auto& [buffer, bytes] : buffers) {
    MK_ASSIGN_OR_RETURN(*buffer, DeviceBuffer::Allocate(bytes));
  }
  MK_ASSIGN_OR_RETURN(inputs_host_, cuda::PinnedBuffer::Allocate(layout.bytes));
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

BatchView WholeModel::ViewOf(int32_t bucket) const {
  const InputLayout at(bucket, stride_);
  const char* base = inputs_.as<char>();
  BatchView view;
  view.rows = view.absorbed_rows = bucket;
  view.tokens = reinterpret_cast<const uint32_t*>(base + at.tokens);
  view.positions = reinterpret_cast<const int32_t*>(base + at.positions);
  view.pages = reinterpret_cast<const uint32_t*>(base + at.pages);
  view.sequences = reinterpret_cast<const int32_t*>(base + at.sequences);
  view.rows_used = reinterpret_cast<const int32_t*>(base + at.used);
  view.page_table = reinterpret_cast<const uint32_t*>(base + at.page_table);
  view.stride = stride_;
  return view;
}

void WholeModel::WriteInputs(std::span<const DecodeInput> inputs, int32_t bucket) {
  const InputLayout at(bucket, stride_);
  char* base = inputs_host_.as<char>();
  auto* tokens = reinterpret_cast<uint32_t*>(base + at.tokens);
  auto* positions = reinterpret_cast<int32_t*>(base + at.positions);
  auto* pages = reinterpret_cast<uint32_t*>(base + at.pages);
  auto* sequences = reinterpret_cast<int32_t*>(base + at.sequences);
  auto* sampling = reinterpret_cast<cuda::SampleRow*>(base + at.sampling);
  auto* table = reinterpret_cast<uint32_t*>(base + at.page_table);
  *reinterpret_cast<int32_t*>(base + at.used) = static_cast<int32_t>(inputs.size());
  std::iota(sequences, sequences + bucket, 0);
  sequences_.clear();
  for (int32_t i = 0; i < bucket; ++i) {
    if (i >= std::ssize(inputs)) {  // padding: token 0 at the beginning of a sequence on the scratch page
      tokens[i] = 0;
      positions[i] = 0;
      pages[i] = table[i * stride_] = attention_->scratch_page();
      sampling[i] = {};
      sequences_.push_back({1, 1});
      continue;
    }
    const DecodeInput& input = inputs[i];
    const int64_t count = input.position / kPageTokens + 1;
    tokens[i] = input.token;
    positions[i] = static_cast<int32_t>(input.position);
    pages[i] = input.pages[count - 1];
    sampling[i] = input.sampling;
    std::copy_n(input.pages.begin(), count, table + i * stride_);
    sequences_.push_back({static_cast<int32_t>(input.position + 1), 1});
  }
}

absl::Status WholeModel::DecodeLaunches(int32_t bucket) {
  const InputLayout at(bucket, stride_);
  MK_RETURN_IF_ERROR(inputs_.Upload(inputs_host_.as(), at.bytes, attention_->stream()));
  MK_RETURN_IF_ERROR(Layers(*batch_));
  MK_ASSIGN_OR_RETURN(const float* const logits, attention_->Logits(*batch_, nullptr, bucket));
  return Sample(logits, reinterpret_cast<const cuda::SampleRow*>(inputs_.as<char>() + at.sampling), bucket);
}

absl::StatusOr<std::span<const uint32_t>> WholeModel::Decode(std::span<const DecodeInput> inputs, Form form) {
  if (inputs.empty()) return std::span<const uint32_t>();
  const auto bucket_at =
      std::lower_bound(options_.buckets.begin(), options_.buckets.end(), std::ssize(inputs));
  if (bucket_at == options_.buckets.end()) {
    return absl::InvalidArgumentError(
        StrCat("Decode: ", inputs.size(), " rows, at most ", options_.buckets.back()));
  }
  for (const DecodeInput& input : inputs) {
    const int64_t pages = input.position / kPageTokens + 1;
    if (input.position < 0 || input.position >= options_.context_max || std::ssize(input.pages) < pages ||
        input.token >= static_cast<uint32_t>(attention_->config().vocab_size) ||
        std::any_of(input.pages.begin(), input.pages.begin() + pages,
                    [&](uint32_t page) { return page >= attention_->scratch_page(); })) {
      return absl::InvalidArgumentError(StrCat("Decode: token ", input.token, " at ", input.position,
                                               " with ", input.pages.size(), " pages"));
    }
  }
  const int32_t bucket = *bucket_at;
  const Observer observer = std::exchange(observer_, nullptr);  // it would wait, and a graph cannot
  const auto run = [&]() -> absl::Status {
    const auto begin = [&](std::span<const DecodeInput> rows) {
      WriteInputs(rows, bucket);
      return attention_->BeginDecode(*batch_, ViewOf(bucket), sequences_);
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
