#include "services/attention/layers/cpu_attention_model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/model/tensors.h"

namespace minke::attention {
namespace {

using kernels::FromActivation;
using kernels::MatMul;
using kernels::PackedMatrix;
using kernels::Tiles;
using kernels::ToActivation;

kernels::MlaShape RankShape(const ModelConfig& config, int64_t ranks) {
  kernels::MlaShape shape(config);
  shape.heads /= ranks;
  return shape;
}

absl::Status CheckShares(const ModelConfig& c, int64_t ranks) {
  const std::pair<const char*, int64_t> shared[] = {
      {"num_attention_heads", c.num_attention_heads},
      {"intermediate_size", c.intermediate_size},
      {"the shared experts' inner dimension", c.shared_intermediate_size()}};
  for (const auto& [name, value] : shared) {
    if (value % ranks != 0) {
      return absl::InvalidArgumentError(
          StrCat("--tensor-parallel: ", name, "=", value, " cannot be shared out to ", ranks));
    }
  }
  return absl::OkStatus();
}

}  // namespace

CpuAttentionModel::CpuAttentionModel(std::shared_ptr<const Checkpoint> checkpoint, Precision precision,
                                     MlaChoice mla, ThreadPool& pool, std::unique_ptr<Collective> group)
    : checkpoint_(std::move(checkpoint)),
      precision_(precision),
      mla_(mla),
      pool_(pool),
      group_(std::move(group)),
      rank_(group_ == nullptr ? 0 : group_->rank()),
      ranks_(group_ == nullptr ? 1 : group_->size()),
      shape_(RankShape(checkpoint_->config(), ranks_)),
      rope_(checkpoint_->config()) {}

// A rank that stays away will not come back: this process can compute nothing more.
void CpuAttentionModel::AddRanks(float* values, int64_t count) {
  if (ranks_ == 1) return;
  const absl::Status status = group_->AllReduceSum({values, static_cast<size_t>(count)});
  if (status.ok()) return;
  log::Error("attention", StrCat("tensor parallel rank ", rank_, ": ", status.message()));
  std::_Exit(1);
}

absl::StatusOr<std::vector<float>> CpuAttentionModel::LoadVector(const std::string& name, int64_t n) const {
  const int64_t shape[] = {n};
  MK_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Find(name, shape));
  std::vector<float> values(n);
  view.Read(0, values);
  return values;
}

absl::Status CpuAttentionModel::LoadLayer(int32_t index) {
  const ModelConfig& c = config();
  Layer& layer = layers_[index];
  const std::string p = LayerPrefix(index), a = p + "self_attn.";
  MK_ASSIGN_OR_RETURN(layer.input_norm, LoadVector(p + "input_layernorm.weight", c.hidden_size));
  MK_ASSIGN_OR_RETURN(layer.post_norm, LoadVector(p + "post_attention_layernorm.weight", c.hidden_size));
  MK_ASSIGN_OR_RETURN(layer.kv_a_norm, LoadVector(a + "kv_a_layernorm.weight", c.kv_lora_rank));

  // Of the tensors by head, this rank's heads: rows of W_Q or W_UQ and of W_UKV, columns of W_O.
  const int64_t all_heads = c.num_attention_heads, first_head = rank_ * shape_.heads, hidden = c.hidden_size;
  // The query's first projection and the latent's read the same input: one product.
  const bool lora = c.q_lora_rank > 0;
  const int64_t q_width = lora ? c.q_lora_rank : shape_.heads * shape_.q_dim();
  const int64_t q_first = lora ? 0 : first_head * shape_.q_dim();
  const int64_t q_shape[] = {lora ? q_width : all_heads * shape_.q_dim(), hidden};
  const int64_t kv_shape[] = {c.latent_dim(), hidden};
  const std::string q_name = a + (lora ? "q_a_proj.weight" : "q_proj.weight");
  MK_ASSIGN_OR_RETURN(const TensorView q, checkpoint_->Find(q_name, q_shape));
  MK_ASSIGN_OR_RETURN(const TensorView kv, checkpoint_->Find(a + "kv_a_proj_with_mqa.weight", kv_shape));
  layer.qkv_a = PackedMatrix::Pack(
      precision_, q_width + c.latent_dim(), hidden,
      [&](int64_t row, std::span<float> out) {
        row < q_width ? q.Read((q_first + row) * hidden, out) : kv.Read((row - q_width) * hidden, out);
      },
      pool_);
  checkpoint_->Release(q);
  checkpoint_->Release(kv);
  if (lora) {
    MK_ASSIGN_OR_RETURN(layer.q_a_norm, LoadVector(a + "q_a_layernorm.weight", c.q_lora_rank));
    const int64_t q_b_shape[] = {all_heads * shape_.q_dim(), c.q_lora_rank};
    MK_ASSIGN_OR_RETURN(const TensorView q_b, checkpoint_->Find(a + "q_b_proj.weight", q_b_shape));
    layer.q_b = PackedMatrix::Pack(
        precision_, shape_.heads * shape_.q_dim(), c.q_lora_rank,
        [&](int64_t row, std::span<float> out) {
          q_b.Read((first_head * shape_.q_dim() + row) * c.q_lora_rank, out);
        },
        pool_);
    checkpoint_->Release(q_b);
  }
  MK_ASSIGN_OR_RETURN(layer.mla, kernels::MlaWeights::Load(*checkpoint_, a + "kv_b_proj.weight", shape_,
                                                           precision_, pool_, {rank_, ranks_}));
  const int64_t o_shape[] = {hidden, all_heads * shape_.v_dim};
  MK_ASSIGN_OR_RETURN(const TensorView o, checkpoint_->Find(a + "o_proj.weight", o_shape));
  layer.o = PackedMatrix::Pack(
      precision_, hidden, shape_.heads * shape_.v_dim,
      [&](int64_t row, std::span<float> out) { o.Read((row * all_heads + first_head) * shape_.v_dim, out); },
      pool_);
  checkpoint_->Release(o);

  const bool moe = c.IsMoeLayer(index);
  layer.has_ffn = !moe || c.n_shared_experts > 0;
  if (layer.has_ffn) {
    MK_ASSIGN_OR_RETURN(
        layer.ffn, kernels::FfnWeights::Load(*checkpoint_, p + (moe ? "mlp.shared_experts." : "mlp."), hidden,
                                             moe ? c.shared_intermediate_size() : c.intermediate_size,
                                             precision_, pool_, {rank_, ranks_}));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<AttentionModel>> CpuAttentionModel::Load(
    std::shared_ptr<const Checkpoint> checkpoint, Precision precision, MlaChoice mla, ThreadPool& pool,
    absl::FunctionRef<void(int32_t)> progress, std::unique_ptr<Collective> group) {
  if (group != nullptr) MK_RETURN_IF_ERROR(CheckShares(checkpoint->config(), group->size()));
  std::unique_ptr<CpuAttentionModel> model(
      new CpuAttentionModel(std::move(checkpoint), precision, mla, pool, std::move(group)));
  const ModelConfig& c = model->config();
  const int64_t table[] = {c.vocab_size, c.hidden_size};
  MK_ASSIGN_OR_RETURN(model->embedding_, model->checkpoint_->Find("model.embed_tokens.weight", table));
  MK_ASSIGN_OR_RETURN(model->final_norm_, model->LoadVector("model.norm.weight", c.hidden_size));
  model->layers_.resize(c.num_hidden_layers);
  for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    MK_RETURN_IF_ERROR(model->LoadLayer(layer));
    progress(layer);
  }
  TensorView head = model->embedding_;
  if (!c.tie_word_embeddings) {
    MK_ASSIGN_OR_RETURN(head, model->checkpoint_->Find("lm_head.weight", table));
  }
  model->head_ = PackedMatrix::Pack(precision, head, pool);
  if (!c.tie_word_embeddings) model->checkpoint_->Release(head);
  return model;
}

absl::Status CpuAttentionModel::Prepare(const ModelLimits& limits) {
  cache_pages_ = limits.cache_pages;
  cache_.emplace(config(), precision_, limits.cache_pages);
  memory_.resize(limits.microbatches);
  return absl::OkStatus();
}

void CpuAttentionModel::ReadPage(int32_t layer, uint32_t page, std::byte* latents) {
  std::memcpy(latents, cache_->layer(layer) + page * page_layer_bytes(), page_layer_bytes());
}

void CpuAttentionModel::WritePage(int32_t layer, uint32_t page, const std::byte* latents) {
  std::memcpy(cache_->layer(layer) + page * page_layer_bytes(), latents, page_layer_bytes());
}

kernels::MlaForm CpuAttentionModel::FormOf(int64_t rows, int64_t position_begin) const {
  switch (mla_) {
    case MlaChoice::kAbsorbed:
      return kernels::MlaForm::kAbsorbed;
    case MlaChoice::kNaive:
      return kernels::MlaForm::kNaive;
    case MlaChoice::kAuto:
      break;
  }
  // Exact mode promises the same bits for every chunking, so it has one form.
  if (precision_ == Precision::kExact) return kernels::MlaForm::kAbsorbed;
  return kernels::CheaperForm(shape_, rows, position_begin);
}

int64_t CpuAttentionModel::CacheBytesPerToken() const {
  return int64_t{config().num_hidden_layers} * shape_.latent_dim() * ActivationBytes(precision_);
}

void CpuAttentionModel::ForRows(int64_t rows, absl::FunctionRef<void(int64_t)> body) {
  constexpr int64_t kGrain = 8;  // about 10 µs of row work at hidden 1024
  pool_.ParallelFor((rows + kGrain - 1) / kGrain, [&](int64_t task) {
    for (int64_t i = task * kGrain; i < std::min(rows, (task + 1) * kGrain); ++i) body(i);
  });
}

// out [n] Act = rms_norm(x) * weight.
void CpuAttentionModel::NormRow(const std::vector<float>& weight, const float* x, std::byte* out) {
  static thread_local std::vector<float> normed;
  const int64_t n = std::ssize(weight);
  normed.resize(n);
  Tiles().rms_norm(x, weight.data(), static_cast<float>(config().rms_norm_eps), normed.data(), n);
  ToActivation(precision_, normed.data(), out, n);
}

void CpuAttentionModel::Embed(const Microbatch& batch) {
  const int64_t hidden = config().hidden_size, rope = shape_.rope_dim;
  BatchMemory& memory = memory_[batch.index];
  float* x = memory.x.Resize(batch.size() * hidden);
  float* angles = memory.angles.Resize(batch.size() * rope);
  ForRows(batch.size(), [&](int64_t i) {
    embedding_.Read(int64_t{batch.rows[i].token} * hidden, {x + i * hidden, static_cast<size_t>(hidden)});
    rope_.Angles(batch.rows[i].position, angles + i * rope);
  });
}

void CpuAttentionModel::Attention(int32_t index, const Microbatch& batch, std::byte* result) {
  BatchMemory& memory = memory_[batch.index];
  std::byte* cache = cache_->layer(index);
  const ModelConfig& c = config();
  Layer& layer = layers_[index];
  const int64_t rows = batch.size(), hidden = c.hidden_size, element = ActivationBytes(precision_);
  const int64_t latent = shape_.latent_dim(), rank = shape_.kv_lora_rank,
                q_full = shape_.heads * shape_.q_dim();
  const int64_t q_width = c.q_lora_rank > 0 ? c.q_lora_rank : q_full, qkv_width = q_width + latent;
  float* x = memory.x.data();
  const float* angles = memory.angles.data();
  std::byte* normed = memory.norm.Resize(rows * hidden * element);
  ForRows(rows, [&](int64_t i) { NormRow(layer.input_norm, x + i * hidden, normed + i * hidden * element); });

  float* qkv = qkv_.Resize(rows * qkv_width);
  MatMul(layer.qkv_a, normed, hidden, rows, qkv, qkv_width, pool_);
  float* q = q_.Resize(rows * q_full);
  std::byte* compressed = q_compressed_.Resize(rows * q_width * element);
  ForRows(rows, [&](int64_t i) {
    float* row = qkv + i * qkv_width;
    if (c.q_lora_rank > 0) {
      NormRow(layer.q_a_norm, row, compressed + i * q_width * element);
    } else {
      std::copy_n(row, q_full, q + i * q_full);
    }
    // The cache row: normed latent, then the rotated key part, which is not normed.
    const StepRow& step = batch.rows[i];
    std::byte* out = cache + (int64_t{step.page} * kernels::kPageTokens + step.page_slot) * latent * element;
    NormRow(layer.kv_a_norm, row + q_width, out);
    kernels::ApplyRope(angles + i * shape_.rope_dim, shape_.rope_dim / 2, row + q_width + rank);
    ToActivation(precision_, row + q_width + rank, out + rank * element, shape_.rope_dim);
  });
  if (c.q_lora_rank > 0) MatMul(layer.q_b, compressed, q_width, rows, q, q_full, pool_);
  ForRows(rows, [&](int64_t i) {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      kernels::ApplyRope(angles + i * shape_.rope_dim, shape_.rope_dim / 2,
                         q + i * q_full + h * shape_.q_dim() + shape_.nope_dim);
    }
  });

  const int64_t v_full = shape_.heads * shape_.v_dim;
  std::byte* heads_out = heads_out_.Resize(rows * v_full * element);
  kernels::MlaAttention(shape_, layer.mla, precision_, batch.chunks, q, rows, cache, heads_out, mla_scratch_,
                        pool_);
  std::byte* out = result != nullptr ? result : normed;
  memory.normed = out;
  float* projected = projected_.Resize(rows * hidden);
  MatMul(layer.o, heads_out, v_full, rows, projected, hidden, pool_);
  AddRanks(projected, rows * hidden);
  ForRows(rows, [&](int64_t i) {
    Tiles().add_scaled(x + i * hidden, projected + i * hidden, 1.0f, hidden);
    NormRow(layer.post_norm, x + i * hidden, out + i * hidden * element);
  });
}

void CpuAttentionModel::FeedForward(int32_t index, const Microbatch& batch) {
  Layer& layer = layers_[index];
  if (!layer.has_ffn) return;
  BatchMemory& memory = memory_[batch.index];
  const int64_t rows = batch.size(), hidden = config().hidden_size;
  float* out = projected_.Resize(rows * hidden);
  const kernels::FfnRows all{&layer.ffn, 0, rows};
  kernels::GroupedFfn({&all, 1}, memory.normed, out, ffn_scratch_, pool_);
  AddRanks(out, rows * hidden);
  float* x = memory.x.data();
  ForRows(rows, [&](int64_t i) { Tiles().add_scaled(x + i * hidden, out + i * hidden, 1.0f, hidden); });
}

void CpuAttentionModel::Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) {
  const int64_t hidden = config().hidden_size, element = ActivationBytes(precision_),
                rows = std::ssize(selected);
  std::byte* in = head_in_.Resize(rows * hidden * element);
  const BatchMemory& memory = memory_[batch.index];
  ForRows(rows, [&](int64_t i) {
    NormRow(final_norm_, memory.x.data() + selected[i] * hidden, in + i * hidden * element);
  });
  MatMul(head_, in, hidden, rows, logits, config().vocab_size, pool_);
}

}  // namespace minke::attention
