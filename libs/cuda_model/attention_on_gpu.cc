#include "libs/cuda_model/attention_on_gpu.h"

#include <algorithm>
#include <numeric>

#include "libs/base/status.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/kernels/cuda/rows.h"

namespace minke::cuda_model {

using cuda::LinearArgs;
using cuda::LinearOutput;

namespace {

constexpr int64_t kPageTokens = kernels::kPageTokens;

int64_t QueryWidth(const ModelConfig& c) {
  return c.q_lora_rank > 0 ? int64_t{c.q_lora_rank} : int64_t{c.num_attention_heads} * c.qk_head_dim();
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionOnGpu>> AttentionOnGpu::Create(
    AttentionWeights weights, const Options& options, std::unique_ptr<DeviceCollective> group) {
  if (weights.share.index != (group ? group->rank() : 0) || weights.share.of != (group ? group->size() : 1)) {
    return absl::InvalidArgumentError(StrCat("AttentionOnGpu: share ", weights.share.index, " of ",
                                             weights.share.of, " of the weights for rank ",
                                             group ? group->rank() : 0, " of ", group ? group->size() : 1));
  }
  if (options.rows_max < 1 || options.rows_max > 65535 || options.sequences_max < 1 ||
      options.cache_pages < 1 || options.prefill_keys_max < 1) {
    return absl::InvalidArgumentError(StrCat("AttentionOnGpu: ", options.rows_max, " rows, ",
                                             options.sequences_max, " sequences, ", options.cache_pages,
                                             " pages"));
  }
  MK_ASSIGN_OR_RETURN(Stream stream, Stream::Create());
  std::unique_ptr<AttentionOnGpu> model(
      new AttentionOnGpu(std::move(weights), options, std::move(stream), std::move(group)));
  const ModelConfig& c = model->config();
  model->decode_fits_ = c.kv_lora_rank == cuda::kLatentRank && c.latent_dim() == cuda::kLatentDim &&
                        c.num_attention_heads % 16 == 0 && c.num_attention_heads <= 128;
  model->prefill_fits_ = c.qk_nope_head_dim == 128 && c.qk_rope_head_dim == 64 && c.v_head_dim == 128;
  MK_RETURN_IF_ERROR(model->Allocate());
  return model;
}

absl::Status AttentionOnGpu::Allocate() {
  const ModelConfig& c = config();
  const int64_t rows = options_.rows_max, heads = c.num_attention_heads,
                keys = prefill_fits_ ? options_.prefill_keys_max : 0;
  int64_t inner = 0;
  for (const LayerWeights& layer : weights_.layers) inner = std::max(inner, layer.inner);
  const auto allocate = [](DeviceBuffer& buffer, int64_t bytes) {
    absl::StatusOr<DeviceBuffer> made = DeviceBuffer::Allocate(bytes);
    if (made.ok()) buffer = *std::move(made);
    return made.status();
  };
  const std::pair<DeviceBuffer*, int64_t> buffers[] = {
      {&cache_, bytes_per_page() * (options_.cache_pages + 1)},
      {&qkv_, rows * (QueryWidth(c) + c.latent_dim()) * 2},
      {&q_compressed_, rows * c.q_lora_rank * 2},
      {&q_, c.q_lora_rank > 0 ? rows * heads * c.qk_head_dim() * 2 : 0},
      {&q_latent_, rows * heads * c.latent_dim() * 2},
      {&out_latent_, rows * heads * c.kv_lora_rank * 2},
      {&q_packed_, prefill_fits_ ? rows * heads * c.qk_head_dim() * 2 : 0},
      {&heads_out_, rows * heads * c.v_head_dim * 2},
      {&latents_, keys * c.latent_dim() * 2},
      {&expanded_, keys * heads * (c.qk_nope_head_dim + c.v_head_dim) * 2},
      {&gate_up_, rows * 2 * inner * 2},
      {&inner_, rows * inner * 2},
      {&selected_, options_.sequences_max * 4},
      {&head_in_, options_.sequences_max * c.hidden_size * 2},
      {&logits_, options_.sequences_max * c.vocab_size * 4},
      {&partial_begin_, (rows + 1) * 4},
      {&one_per_row_, (rows + 1) * 4},
      {&partials_, c.n_routed_experts > 0 ? rows * c.fan_out_max() * c.hidden_size * 4 : 0}};
  for (const auto& [buffer, bytes] : buffers) MK_RETURN_IF_ERROR(allocate(*buffer, bytes));
  for (auto* linear : {&linear_, &ffn_linear_, &logits_linear_}) {
    MK_ASSIGN_OR_RETURN(cuda::Linear made, cuda::Linear::Create());
    *linear = std::move(made);
  }
  std::vector<int32_t> one_per_row(rows + 1);
  std::iota(one_per_row.begin(), one_per_row.end(), 0);
  MK_RETURN_IF_ERROR(one_per_row_.Upload(one_per_row.data(), one_per_row_.bytes(), stream_));
  return cache_.Fill(0, stream_);
}

int64_t AttentionOnGpu::bytes_per_page() const {
  return int64_t{config().num_hidden_layers} * kPageTokens * config().latent_dim() * 2;
}

absl::Status AttentionOnGpu::ReadPage(int32_t layer, uint32_t page, void* latents) const {
  const int64_t bytes = bytes_per_page() / config().num_hidden_layers;
  const int64_t offset = (layer * (options_.cache_pages + 1) + page) * bytes;
  MK_RETURN_IF_ERROR(cache_.Download(latents, bytes, stream_, offset));
  return Synchronize();
}

absl::Status AttentionOnGpu::WritePage(int32_t layer, uint32_t page, const void* latents) {
  const int64_t bytes = bytes_per_page() / config().num_hidden_layers;
  const int64_t offset = (layer * (options_.cache_pages + 1) + page) * bytes;
  MK_RETURN_IF_ERROR(cache_.Upload(latents, bytes, stream_, offset));
  return Synchronize();
}

bf16* AttentionOnGpu::cache(int32_t layer) const {
  return cache_.as<bf16>() + layer * (options_.cache_pages + 1) * kPageTokens * config().latent_dim();
}

absl::StatusOr<std::unique_ptr<GpuBatch>> AttentionOnGpu::MakeBatch() {
  std::unique_ptr<GpuBatch> batch(new GpuBatch());
  const int64_t values = options_.rows_max * config().hidden_size;
  MK_ASSIGN_OR_RETURN(batch->x_, DeviceBuffer::Allocate(values * 4));
  MK_ASSIGN_OR_RETURN(batch->normed_, DeviceBuffer::Allocate(values * 2));
  MK_ASSIGN_OR_RETURN(batch->angles_,
                      DeviceBuffer::Allocate(options_.rows_max * config().qk_rope_head_dim * 4));
  MK_ASSIGN_OR_RETURN(cuda::Event event, cuda::Event::Create());
  batch->uploaded_ = std::move(event);
  if (decode_fits_) {
    cuda::MlaDecode::Options options;
    options.heads = config().num_attention_heads;
    options.softmax_scale = static_cast<float>(config().softmax_scale());
    options.sequences_max = static_cast<int32_t>(options_.rows_max);
    options.path = options_.path;
    MK_ASSIGN_OR_RETURN(cuda::MlaDecode decode, cuda::MlaDecode::Create(options));
    batch->decode_ = std::move(decode);
  }
  return batch;
}

bool AttentionOnGpu::Absorbed(int64_t rows, int64_t position_begin) const {
  return !prefill_fits_ || position_begin + rows > options_.prefill_keys_max ||
         kernels::CheaperForm(kernels::MlaShape(config()), rows, position_begin) ==
             kernels::MlaForm::kAbsorbed;
}

absl::Status AttentionOnGpu::Embed(GpuBatch& batch) {
  const ModelConfig& c = config();
  batch.pending = nullptr;
  MK_RETURN_IF_ERROR(cuda::EmbedRows(weights_.embedding.as<bf16>(), c.vocab_size, batch.view.tokens,
                                     batch.rows(), c.hidden_size, batch.x(), stream_));
  return cuda::RotaryAngles(weights_.inv_freq.as<double>(), weights_.rope_magnitude, c.qk_rope_head_dim / 2,
                            batch.view.positions, batch.rows(), batch.angles_.as<float>(), stream_);
}

absl::Status AttentionOnGpu::Norm(const GpuBatch& batch, const DeviceBuffer& weight, bool add) {
  cuda::NormArgs args;
  args.x = batch.x();
  args.add = add ? batch.pending : nullptr;
  args.weight = weight.as<float>();
  args.eps = static_cast<float>(config().rms_norm_eps);
  args.out = batch.normed();
  args.rows = batch.rows();
  args.width = config().hidden_size;
  return cuda::NormRows(args, stream_);
}

absl::Status AttentionOnGpu::Attention(int32_t index, GpuBatch& batch) {
  const ModelConfig& c = config();
  const LayerWeights& layer = weights_.layers[index];
  const BatchView& view = batch.view;
  const int64_t rows = view.rows, hidden = c.hidden_size, heads = c.num_attention_heads;
  const int64_t q_width = QueryWidth(c), width = q_width + c.latent_dim(), qk = c.qk_head_dim();
  MK_RETURN_IF_ERROR(Norm(batch, layer.input_norm, true));
  batch.pending = nullptr;
  MK_RETURN_IF_ERROR(linear_->Run(LinearArgs{.x = batch.normed(),
                                             .x_row = hidden,
                                             .w = layer.qkv_a.as<bf16>(),
                                             .y = qkv_.as(),
                                             .y_row = width,
                                             .rows = rows,
                                             .n = width,
                                             .k = hidden},
                                  stream_));
  cuda::LatentArgs latent;
  latent.qkv = qkv_.as<bf16>();
  latent.qkv_row = width;
  latent.q_rank = c.q_lora_rank;
  latent.q_norm = layer.q_a_norm.as<float>();
  latent.q_compressed = q_compressed_.as<bf16>();
  latent.latent_offset = static_cast<int32_t>(q_width);
  latent.rank = c.kv_lora_rank;
  latent.rope = c.qk_rope_head_dim;
  latent.latent_norm = layer.kv_a_norm.as<float>();
  latent.eps = static_cast<float>(c.rms_norm_eps);
  latent.cos_sin = batch.angles_.as<float>();
  latent.cache = cache(index);
  latent.pages = view.pages;
  latent.positions = view.positions;
  const bf16* q = c.q_lora_rank > 0 ? q_.as<bf16>() : qkv_.as<bf16>();
  const int64_t q_row = c.q_lora_rank > 0 ? heads * qk : width;
  cuda::QueryArgs query;  // of the absorbed rows: only the rotary part moves
  query.q = q;
  query.q_row = q_row;
  query.heads = c.num_attention_heads;
  query.nope = c.qk_nope_head_dim;
  query.rope = c.qk_rope_head_dim;
  query.cos_sin = batch.angles_.as<float>();
  query.rotated = q_latent_.as<bf16>() + c.kv_lora_rank;
  query.rotated_row = heads * c.latent_dim();
  query.rotated_head = c.latent_dim();
  if (c.q_lora_rank == 0 && view.absorbed_rows == rows) {
    MK_RETURN_IF_ERROR(cuda::LatentAndQueryRows(&latent, &query, rows, stream_));
  } else {
    MK_RETURN_IF_ERROR(cuda::LatentAndQueryRows(&latent, nullptr, rows, stream_));
    if (c.q_lora_rank > 0) {
      MK_RETURN_IF_ERROR(linear_->Run(LinearArgs{.x = q_compressed_.as<bf16>(),
                                                 .x_row = c.q_lora_rank,
                                                 .w = layer.q_b.as<bf16>(),
                                                 .y = q_.as(),
                                                 .y_row = q_row,
                                                 .rows = rows,
                                                 .n = heads * qk,
                                                 .k = c.q_lora_rank},
                                      stream_));
    }
    MK_RETURN_IF_ERROR(cuda::LatentAndQueryRows(nullptr, &query, view.absorbed_rows, stream_));
  }
  if (view.absorbed_rows > 0) MK_RETURN_IF_ERROR(AbsorbedRows(index, batch, q, q_row));
  if (view.absorbed_rows < rows) MK_RETURN_IF_ERROR(NaiveRows(index, batch, q, q_row));
  const int64_t v_full = heads * c.v_head_dim;
  MK_RETURN_IF_ERROR(AddToResidual(
      *linear_, {.x = heads_out_.as<bf16>(), .x_row = v_full, .w = layer.o.as<bf16>(), .k = v_full}, batch,
      stream_));
  return Norm(batch, layer.post_norm, false);
}

absl::Status AttentionOnGpu::FeedForward(int32_t index, GpuBatch& batch, const Stream& stream) {
  const LayerWeights& layer = weights_.layers[index];
  if (layer.inner == 0) return absl::OkStatus();
  const int64_t rows = batch.rows(), hidden = config().hidden_size, inner = layer.inner;
  MK_RETURN_IF_ERROR(ffn_linear_->Run(LinearArgs{.x = batch.normed(),
                                                 .x_row = hidden,
                                                 .w = layer.gate_up.as<bf16>(),
                                                 .y = gate_up_.as(),
                                                 .y_row = 2 * inner,
                                                 .rows = rows,
                                                 .n = 2 * inner,
                                                 .k = hidden},
                                      stream));
  MK_RETURN_IF_ERROR(cuda::SwiGluRows(gate_up_.as<bf16>(), rows, inner, inner_.as<bf16>(), stream));
  return AddToResidual(*ffn_linear_,
                       {.x = inner_.as<bf16>(), .x_row = inner, .w = layer.down.as<bf16>(), .k = inner},
                       batch, stream);
}

// The first rank adds its product to x, the others write theirs over it: what they then add up is the new x.
absl::Status AttentionOnGpu::AddToResidual(cuda::Linear& linear, LinearArgs product, GpuBatch& batch,
                                           const Stream& stream) {
  const int64_t hidden = config().hidden_size;
  product.y = batch.x();
  product.y_row = product.n = hidden;
  product.rows = batch.rows();
  product.output = weights_.share.index == 0 ? LinearOutput::kAddF32 : LinearOutput::kF32;
  MK_RETURN_IF_ERROR(linear.Run(product, stream));
  return group_ ? group_->AllReduceSum(batch.x(), batch.rows() * hidden, stream) : absl::OkStatus();
}

absl::StatusOr<const float*> AttentionOnGpu::Logits(GpuBatch& batch, const int32_t* selected, int64_t count) {
  const ModelConfig& c = config();
  if (count > options_.sequences_max) {
    return absl::InvalidArgumentError(StrCat("Logits: ", count, " rows, room for ", options_.sequences_max));
  }
  cuda::NormArgs args;
  args.x = batch.x();
  args.add = batch.pending;
  args.weight = weights_.final_norm.as<float>();
  args.eps = static_cast<float>(c.rms_norm_eps);
  args.out = head_in_.as<bf16>();
  args.rows = count;
  args.width = c.hidden_size;
  args.select = selected;
  MK_RETURN_IF_ERROR(cuda::NormRows(args, stream_));
  if (selected == nullptr) batch.pending = nullptr;  // it is in x now
  const DeviceBuffer& head = c.tie_word_embeddings ? weights_.embedding : weights_.head;
  MK_RETURN_IF_ERROR(logits_linear_->Run(LinearArgs{.x = head_in_.as<bf16>(),
                                                    .x_row = c.hidden_size,
                                                    .w = head.as<bf16>(),
                                                    .y = logits_.as(),
                                                    .y_row = c.vocab_size,
                                                    .rows = count,
                                                    .n = c.vocab_size,
                                                    .k = c.hidden_size,
                                                    .output = LinearOutput::kF32},
                                         stream_));
  return logits_.as<float>();
}

absl::StatusOr<const float*> AttentionOnGpu::Logits(GpuBatch& batch, std::span<const int32_t> selected) {
  for (const int32_t row : selected) {
    if (row < 0 || row >= batch.rows()) return absl::InvalidArgumentError(StrCat("Logits: row ", row));
  }
  MK_RETURN_IF_ERROR(selected_.Upload(selected.data(), std::ssize(selected) * 4, stream_));
  return Logits(batch, selected_.as<int32_t>(), std::ssize(selected));
}

absl::Status AttentionOnGpu::DownloadLogits(int64_t begin, int64_t rows, float* logits) const {
  if (begin < 0 || rows < 0 || begin + rows > options_.sequences_max) {
    return absl::InvalidArgumentError(StrCat("DownloadLogits: ", rows, " rows from ", begin));
  }
  const int64_t row_bytes = config().vocab_size * int64_t{sizeof(float)};
  MK_RETURN_IF_ERROR(logits_.Download(logits, rows * row_bytes, stream_, begin * row_bytes));
  return Synchronize();
}

absl::StatusOr<std::vector<float>> AttentionOnGpu::DownloadLogits(int64_t rows) const {
  std::vector<float> logits(std::max<int64_t>(0, rows) * config().vocab_size);
  MK_RETURN_IF_ERROR(DownloadLogits(0, rows, logits.data()));
  return logits;
}

absl::Status AttentionOnGpu::DownloadNormed(const GpuBatch& batch, bf16* host) const {
  return batch.normed_.Download(host, batch.rows() * config().hidden_size * 2, stream_);
}

template <class T>
absl::Status AttentionOnGpu::AddPartialsOf(GpuBatch& batch, std::span<const int32_t> begin,
                                           const T* partials) {
  if (std::ssize(begin) != batch.rows() + 1 || begin.front() != 0 ||
      !std::is_sorted(begin.begin(), begin.end())) {
    return absl::InvalidArgumentError(
        StrCat("AddPartials: ", begin.size(), " offsets for ", batch.rows(), " rows"));
  }
  const int64_t hidden = config().hidden_size;
  MK_RETURN_IF_ERROR(partial_begin_.Upload(begin.data(), std::ssize(begin) * 4, stream_));
  MK_RETURN_IF_ERROR(partials_.Upload(partials, begin.back() * hidden * int64_t{sizeof(T)}, stream_));
  return cuda::AddPartialRows(batch.x(), batch.rows(), hidden, partial_begin_.as<int32_t>(),
                              partials_.as<T>(), stream_);
}

absl::Status AttentionOnGpu::AddPartials(GpuBatch& batch, std::span<const int32_t> begin,
                                         const bf16* partials) {
  return AddPartialsOf(batch, begin, partials);
}

absl::Status AttentionOnGpu::AddPartials(GpuBatch& batch, std::span<const int32_t> begin,
                                         const float* partials) {
  return AddPartialsOf(batch, begin, partials);
}

absl::Status AttentionOnGpu::AddSums(GpuBatch& batch, const float* sums) {
  const int64_t hidden = config().hidden_size;
  MK_RETURN_IF_ERROR(partials_.Upload(sums, batch.rows() * hidden * int64_t{sizeof(float)}, stream_));
  return AddDeviceSums(batch, partials_.as<float>());
}

absl::Status AttentionOnGpu::AddDeviceSums(GpuBatch& batch, const float* sums) {
  return cuda::AddPartialRows(batch.x(), batch.rows(), config().hidden_size, one_per_row_.as<int32_t>(), sums,
                              stream_);
}

}  // namespace minke::cuda_model
