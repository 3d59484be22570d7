#include "libs/cuda_model/weights.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "libs/base/status.h"
#include "libs/cuda_model/weight_plan.h"
#include "libs/kernels/cpu/rope.h"
#include "libs/model/tensors.h"

namespace minke::cuda_model {
namespace {

constexpr int64_t kHalfBytes = int64_t{32} << 20;

}  // namespace

absl::StatusOr<CheckpointSource> CheckpointSource::Create(const Checkpoint& checkpoint) {
  CheckpointSource source(checkpoint);
  MK_ASSIGN_OR_RETURN(source.staging_, cuda::PinnedBuffer::Allocate(2 * kHalfBytes));
  for (int i = 0; i < 2; ++i) {
    MK_ASSIGN_OR_RETURN(cuda::Event event, cuda::Event::Create());
    source.copied_.push_back(std::move(event));
  }
  return source;
}

absl::StatusOr<std::byte*> CheckpointSource::Half() {
  half_ ^= 1;
  if (used_[half_]) MK_RETURN_IF_ERROR(copied_[half_].Synchronize());
  used_[half_] = true;
  return staging_.as<std::byte>() + half_ * kHalfBytes;
}

absl::Status CheckpointSource::ReadPart(const std::string& name, std::span<const int64_t> shape,
                                        const MatrixPart& part, DeviceBuffer& to, int64_t offset,
                                        const Stream& stream) {
  MK_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Find(name, shape));
  // Rows as wide as the matrix lie one behind the other: one long row.
  const bool whole_rows = part.columns == shape[1];
  const int64_t rows = whole_rows ? 1 : part.rows, width = whole_rows ? part.rows * shape[1] : part.columns;
  const int64_t first = part.row_begin * shape[1] + part.column_begin;
  std::vector<float> wide;
  const auto copy = [&](int64_t from, int64_t count, bf16* half) {
    if (view.dtype == DType::kBF16) {
      std::memcpy(half, view.data + from * 2, count * 2);
      return;
    }
    wide.resize(count);
    view.Read(from, wide);
    std::transform(wide.begin(), wide.end(), half, F32ToBF16);
  };
  constexpr int64_t kHalfValues = kHalfBytes / 2;
  for (int64_t done = 0; done < rows * width;) {
    MK_ASSIGN_OR_RETURN(std::byte* const bytes, Half());
    bf16* const half = reinterpret_cast<bf16*>(bytes);
    int64_t filled = 0;
    while (filled < kHalfValues && done + filled < rows * width) {  // row by row, or a piece of a long one
      const int64_t at = done + filled, row = at / width, column = at % width;
      const int64_t count = std::min(width - column, kHalfValues - filled);
      copy(first + row * shape[1] + column, count, half + filled);
      filled += count;
    }
    MK_RETURN_IF_ERROR(to.Upload(half, filled * 2, stream, offset + done * 2));
    MK_RETURN_IF_ERROR(copied_[half_].Record(stream));
    done += filled;
  }
  checkpoint_->Release(view);
  return absl::OkStatus();
}

absl::Status CheckpointSource::ReadF32(const std::string& name, int64_t count, DeviceBuffer& to,
                                       const Stream& stream) {
  const int64_t shape[] = {count};
  MK_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Find(name, shape));
  std::vector<float> values(count);
  view.Read(0, values);
  MK_RETURN_IF_ERROR(to.Upload(values.data(), count * 4, stream));
  return stream.Synchronize();  // `values` goes
}

absl::Status CheckSupported(const ModelConfig& c, int64_t ranks) {
  const std::pair<const char*, int64_t> dimensions[] = {
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"moe_intermediate_size", c.n_routed_experts > 0 ? c.moe_intermediate_size : 8},
      {"q_lora_rank", c.q_lora_rank},
      {"kv_lora_rank", c.kv_lora_rank},
      {"qk_nope_head_dim", c.qk_nope_head_dim},
      {"qk_rope_head_dim", c.qk_rope_head_dim},
      {"v_head_dim", c.v_head_dim}};
  for (const auto& [name, value] : dimensions) {
    if (value % 8 != 0) {
      return absl::InvalidArgumentError(
          StrCat(name, ": the GPU kernels expect a multiple of 8, found ", value));
    }
  }
  const std::tuple<const char*, int64_t, int64_t> shared[] = {
      {"num_attention_heads", c.num_attention_heads, 1},
      {"intermediate_size", c.intermediate_size, 8},
      {"the shared experts' inner dimension", c.shared_intermediate_size(), 8}};
  for (const auto& [name, value, multiple] : shared) {
    if (ranks > 1 && value % (ranks * multiple) != 0) {
      return absl::InvalidArgumentError(StrCat("--tensor-parallel: ", name, "=", value,
                                               " cannot be shared out to ", ranks, " ranks in multiples of ",
                                               multiple));
    }
  }
  const bool moe = c.n_routed_experts > 0;
  const std::tuple<const char*, int64_t, int64_t> limits[] = {
      {"kv_lora_rank + qk_rope_head_dim", c.latent_dim(), 8192},
      {"vocab_size", c.vocab_size, 1 << 18},
      {"n_routed_experts", c.n_routed_experts, cuda::kGroupedFfnExpertsMax},
      {"num_experts_per_tok", moe ? c.num_experts_per_tok : 0, 32},
      {"n_group", moe ? c.n_group : 0, 32}};
  for (const auto& [name, value, most] : limits) {
    if (value > most) {
      return absl::InvalidArgumentError(
          StrCat(name, ": the GPU kernels expect at most ", most, ", found ", value));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<AttentionWeights> AttentionWeights::Load(const ModelConfig& c, WeightSource& source,
                                                        const Stream& stream,
                                                        absl::FunctionRef<void(int32_t)> progress,
                                                        kernels::Share share) {
  MK_RETURN_IF_ERROR(CheckSupported(c, share.of));
  AttentionWeights weights;
  weights.config = c;
  weights.config.num_attention_heads /= static_cast<int32_t>(share.of);
  weights.share = share;
  weights.layers.resize(c.num_hidden_layers);
  for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    const int64_t inner = c.IsMoeLayer(layer) ? c.shared_intermediate_size() : c.intermediate_size;
    weights.layers[layer].inner = inner / share.of;
  }
  const kernels::Rope rope(c);
  MK_ASSIGN_OR_RETURN(weights.inv_freq, DeviceBuffer::Allocate(rope.half_dim() * 8));
  MK_RETURN_IF_ERROR(weights.inv_freq.Upload(rope.inv_freq().data(), rope.half_dim() * 8, stream));
  weights.rope_magnitude = rope.magnitude();
  const std::vector<PlannedTensor> plan = PlanWeights(c, share);
  for (const PlannedTensor& tensor : plan) {
    if (tensor.offset > 0) continue;
    MK_ASSIGN_OR_RETURN(tensor.BufferIn(weights), DeviceBuffer::Allocate(tensor.buffer_bytes));
  }
  MK_RETURN_IF_ERROR(ReadPlanned(plan, source, stream, weights, progress));
  MK_RETURN_IF_ERROR(source.Finish(stream));
  return weights;
}

absl::StatusOr<DeviceBuffer> LoadGate(const ModelConfig& c, int32_t layer, WeightSource& source,
                                      const Stream& stream) {
  const int64_t shape[] = {c.n_routed_experts, c.hidden_size};
  MK_ASSIGN_OR_RETURN(DeviceBuffer gate, DeviceBuffer::Allocate(shape[0] * shape[1] * 2));
  MK_RETURN_IF_ERROR(source.Read(LayerPrefix(layer) + "mlp.gate.weight", shape, gate, 0, stream));
  return gate;
}

absl::StatusOr<cuda::GroupedFfnWeights> LoadExperts(const ModelConfig& c, int32_t layer, ExpertRange range,
                                                    cuda::FfnFormat format, WeightSource& source,
                                                    DeviceBuffer& staging, const Stream& stream) {
  const int64_t hidden = c.hidden_size, inner = c.moe_intermediate_size, bytes = hidden * inner * 2;
  if (staging.bytes() < 3 * bytes) {
    MK_ASSIGN_OR_RETURN(staging, DeviceBuffer::Allocate(3 * bytes));
  }
  cuda::GroupedFfnShape shape;
  shape.experts = range.size();
  shape.hidden = c.hidden_size;
  shape.inner = c.moe_intermediate_size;
  MK_ASSIGN_OR_RETURN(cuda::GroupedFfnWeights weights, cuda::GroupedFfnWeights::Create(shape, format));
  const int64_t up[] = {inner, hidden}, down[] = {hidden, inner};
  for (int32_t expert = range.begin; expert < range.end; ++expert) {
    const std::string p = ExpertPrefix(layer, expert);
    MK_RETURN_IF_ERROR(source.Read(p + "gate_proj.weight", up, staging, 0, stream));
    MK_RETURN_IF_ERROR(source.Read(p + "up_proj.weight", up, staging, bytes, stream));
    MK_RETURN_IF_ERROR(source.Read(p + "down_proj.weight", down, staging, 2 * bytes, stream));
    const bf16* from = staging.as<bf16>();
    MK_RETURN_IF_ERROR(weights.Load(expert - range.begin, from, from + bytes / 2, from + bytes, stream));
  }
  return weights;
}

}  // namespace minke::cuda_model
