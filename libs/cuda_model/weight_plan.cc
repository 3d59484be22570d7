#include "libs/cuda_model/weight_plan.h"

#include "libs/base/hash.h"
#include "libs/base/status.h"
#include "libs/model/tensors.h"

namespace minke::cuda_model {
namespace {

// Appends the tensors of one buffer after the other.
class Planner {
 public:
  explicit Planner(std::vector<PlannedTensor>& plan) : plan_(plan) {}

  void Model(DeviceBuffer AttentionWeights::*buffer, std::vector<PlannedTensor> tensors) {
    for (PlannedTensor& tensor : tensors) tensor.model_buffer = buffer;
    Append(std::move(tensors));
  }
  void Layer(int32_t layer, DeviceBuffer LayerWeights::*buffer, std::vector<PlannedTensor> tensors) {
    for (PlannedTensor& tensor : tensors) tensor.layer = layer, tensor.layer_buffer = buffer;
    Append(std::move(tensors));
  }

 private:
  void Append(std::vector<PlannedTensor> tensors) {
    int64_t bytes = 0;
    for (PlannedTensor& tensor : tensors) {
      tensor.offset = bytes;
      bytes += tensor.bytes = tensor.f32 ? tensor.shape[0] * 4 : tensor.part.rows * tensor.part.columns * 2;
    }
    for (PlannedTensor& tensor : tensors) {
      tensor.buffer_bytes = bytes;
      plan_.push_back(std::move(tensor));
    }
  }
  std::vector<PlannedTensor>& plan_;
};

PlannedTensor Norm(std::string name, int64_t count) {
  return {.name = std::move(name), .shape = {count}, .f32 = true};
}
PlannedTensor Matrix(std::string name, int64_t rows, int64_t columns) {
  return {.name = std::move(name), .shape = {rows, columns}, .part = {.rows = rows, .columns = columns}};
}
// The share's rows, or columns, of a matrix that has them for all.
PlannedTensor Rows(std::string name, int64_t all_rows, int64_t columns, kernels::Share share) {
  const int64_t rows = all_rows / share.of;
  return {.name = std::move(name),
          .shape = {all_rows, columns},
          .part = {.row_begin = share.index * rows, .rows = rows, .columns = columns}};
}
PlannedTensor Columns(std::string name, int64_t rows, int64_t all_columns, kernels::Share share) {
  const int64_t columns = all_columns / share.of;
  return {.name = std::move(name),
          .shape = {rows, all_columns},
          .part = {.rows = rows, .column_begin = share.index * columns, .columns = columns}};
}

// Of the tensors by head, a share has rows of W_Q or W_UQ and of W_UKV, and columns of W_O; of a feed-forward
// block, rows of gate and up and columns of down. What W_O and down give is then a part of the sum.
void PlanLayer(const ModelConfig& c, int32_t layer, kernels::Share share, Planner& planner) {
  using L = LayerWeights;
  const std::string p = LayerPrefix(layer), a = p + "self_attn.";
  const int64_t hidden = c.hidden_size, heads = c.num_attention_heads, q_all = heads * c.qk_head_dim();
  const bool lora = c.q_lora_rank > 0;
  const auto add = [&](DeviceBuffer L::*buffer, std::vector<PlannedTensor> tensors) {
    planner.Layer(layer, buffer, std::move(tensors));
  };
  add(&L::input_norm, {Norm(p + "input_layernorm.weight", hidden)});
  add(&L::post_norm, {Norm(p + "post_attention_layernorm.weight", hidden)});
  add(&L::kv_a_norm, {Norm(a + "kv_a_layernorm.weight", c.kv_lora_rank)});
  // The query's first projection and the latent's read the same input: one product.
  add(&L::qkv_a, {lora ? Matrix(a + "q_a_proj.weight", c.q_lora_rank, hidden)
                       : Rows(a + "q_proj.weight", q_all, hidden, share),
                  Matrix(a + "kv_a_proj_with_mqa.weight", c.latent_dim(), hidden)});
  if (lora) {
    add(&L::q_a_norm, {Norm(a + "q_a_layernorm.weight", c.q_lora_rank)});
    add(&L::q_b, {Rows(a + "q_b_proj.weight", q_all, c.q_lora_rank, share)});
  }
  add(&L::kv_b,
      {Rows(a + "kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, share)});
  add(&L::o, {Columns(a + "o_proj.weight", hidden, heads * c.v_head_dim, share)});
  const bool moe = c.IsMoeLayer(layer);
  const int64_t inner = moe ? c.shared_intermediate_size() : c.intermediate_size;
  if (inner == 0) return;
  const std::string f = p + (moe ? "mlp.shared_experts." : "mlp.");
  add(&L::gate_up,
      {Rows(f + "gate_proj.weight", inner, hidden, share), Rows(f + "up_proj.weight", inner, hidden, share)});
  add(&L::down, {Columns(f + "down_proj.weight", hidden, inner, share)});
}

}  // namespace

std::vector<PlannedTensor> PlanWeights(const ModelConfig& c, kernels::Share share) {
  using A = AttentionWeights;
  std::vector<PlannedTensor> plan;
  Planner planner(plan);
  planner.Model(&A::embedding, {Matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)});
  planner.Model(&A::final_norm, {Norm("model.norm.weight", c.hidden_size)});
  if (!c.tie_word_embeddings) {
    planner.Model(&A::head, {Matrix("lm_head.weight", c.vocab_size, c.hidden_size)});
  }
  for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) PlanLayer(c, layer, share, planner);
  return plan;
}

absl::Status ReadPlanned(const std::vector<PlannedTensor>& plan, WeightSource& source, const Stream& stream,
                         AttentionWeights& weights, absl::FunctionRef<void(int32_t)> progress) {
  for (size_t i = 0; i < plan.size(); ++i) {
    const PlannedTensor& tensor = plan[i];
    DeviceBuffer& to = tensor.BufferIn(weights);
    MK_RETURN_IF_ERROR(
        tensor.f32 ? source.ReadF32(tensor.name, tensor.shape[0], to, stream)
                   : source.ReadPart(tensor.name, tensor.shape, tensor.part, to, tensor.offset, stream));
    if (tensor.layer >= 0 && (i + 1 == plan.size() || plan[i + 1].layer != tensor.layer)) {
      progress(tensor.layer);
    }
  }
  return absl::OkStatus();
}

uint64_t ChecksumOf(const std::vector<PlannedTensor>& plan) {
  uint64_t hash = kFnvStart;
  for (const PlannedTensor& tensor : plan) {
    hash = Fnv1a(StrCat(tensor.name, tensor.f32 ? " f32 " : " bf16 ", tensor.bytes, "\n"), hash);
  }
  return hash;
}

}  // namespace minke::cuda_model
