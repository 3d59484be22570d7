// AttentionOnGpu's two forms of MLA, between the queries and the heads' outputs: docs/mathematics.md.
#include "libs/base/status.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/kernels/cuda/mla_generic.h"
#include "libs/kernels/cuda/rows.h"

namespace minke::cuda_model {

using cuda::HeadLinearArgs;
using cuda::LinearArgs;

absl::Status AttentionOnGpu::AbsorbedRows(int32_t index, GpuBatch& batch, const bf16* q, int64_t q_row) {
  const ModelConfig& c = config();
  const LayerWeights& layer = weights_.layers[index];
  const BatchView& view = batch.view;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank, nope = c.qk_nope_head_dim,
                v = c.v_head_dim;
  MK_RETURN_IF_ERROR(linear_->Run(HeadLinearArgs{.x = q,
                                                 .x_row = q_row,
                                                 .x_head = c.qk_head_dim(),
                                                 .w = layer.kv_b.as<bf16>(),
                                                 .w_head = (nope + v) * rank,
                                                 .w_is_kn = true,
                                                 .y = q_latent_.as<bf16>(),
                                                 .y_row = heads * c.latent_dim(),
                                                 .y_head = c.latent_dim(),
                                                 .rows = view.absorbed_rows,
                                                 .n = rank,
                                                 .k = nope,
                                                 .heads = heads},
                                  stream_));
  if (batch.decode_) {
    cuda::MlaDecodeArgs args;
    args.q = q_latent_.as<bf16>();
    args.cache = cache(index);
    args.cache_pages = options_.cache_pages + 1;
    args.page_table = view.page_table;
    args.page_table_stride = view.stride;
    args.out = out_latent_.as<bf16>();
    MK_RETURN_IF_ERROR(batch.decode_->Run(args, stream_));
  } else {
    cuda::MlaGenericArgs args;
    args.q = q_latent_.as<bf16>();
    args.cache = cache(index);
    args.page_table = view.page_table;
    args.page_table_stride = view.stride;
    args.sequences = view.sequences;
    args.positions = view.positions;
    args.out = out_latent_.as<bf16>();
    args.rows = view.absorbed_rows;
    args.heads = c.num_attention_heads;
    args.rank = c.kv_lora_rank;
    args.rope = c.qk_rope_head_dim;
    args.softmax_scale = static_cast<float>(c.softmax_scale());
    MK_RETURN_IF_ERROR(cuda::MlaGeneric(args, stream_));
  }
  return linear_->Run(HeadLinearArgs{.x = out_latent_.as<bf16>(),
                                     .x_row = heads * rank,
                                     .x_head = rank,
                                     .w = layer.kv_b.as<bf16>() + nope * rank,
                                     .w_head = (nope + v) * rank,
                                     .y = heads_out_.as<bf16>(),
                                     .y_row = heads * v,
                                     .y_head = v,
                                     .rows = view.absorbed_rows,
                                     .n = v,
                                     .k = rank,
                                     .heads = heads},
                      stream_);
}

absl::Status AttentionOnGpu::NaiveRows(int32_t index, GpuBatch& batch, const bf16* q, int64_t q_row) {
  const ModelConfig& c = config();
  const LayerWeights& layer = weights_.layers[index];
  const int64_t first = batch.view.absorbed_rows, rows = batch.view.rows - first,
                heads = c.num_attention_heads;
  const int64_t qk = c.qk_head_dim(), nope = c.qk_nope_head_dim, v = c.v_head_dim, latent = c.latent_dim();
  cuda::QueryArgs query;
  query.q = q + first * q_row;
  query.q_row = q_row;
  query.heads = c.num_attention_heads;
  query.nope = c.qk_nope_head_dim;
  query.rope = c.qk_rope_head_dim;
  query.cos_sin = batch.angles_.as<float>() + first * c.qk_rope_head_dim;
  query.nope_copy = q_packed_.as<bf16>();
  query.rotated = q_packed_.as<bf16>() + nope;
  query.rotated_row = heads * qk;
  query.rotated_head = qk;
  MK_RETURN_IF_ERROR(cuda::LatentAndQueryRows(nullptr, &query, rows, stream_));
  for (size_t i = 0; i < batch.passes_used_; ++i) {
    NaivePass& pass = batch.passes_[i];
    cuda::GatherArgs gather;
    gather.cache = cache(index);
    gather.width = latent;
    gather.page_table = pass.page_table;
    gather.stride = pass.pages_max;
    gather.keys = pass.key_counts;
    gather.key_begin = pass.key_begin;
    gather.sequences = pass.sequences;
    gather.pages_max = pass.pages_max;
    gather.out = latents_.as<bf16>();
    MK_RETURN_IF_ERROR(cuda::GatherLatents(gather, stream_));
    const int64_t width = heads * (nope + v);
    MK_RETURN_IF_ERROR(linear_->Run(LinearArgs{.x = latents_.as<bf16>(),
                                               .x_row = latent,
                                               .w = layer.kv_b.as<bf16>(),
                                               .y = expanded_.as(),
                                               .y_row = width,
                                               .rows = pass.keys,
                                               .n = width,
                                               .k = c.kv_lora_rank},
                                    stream_));
    cuda::MlaPrefillArgs args;
    args.q = q_packed_.as<bf16>() + (pass.row_begin - first) * heads * qk;
    args.k = {expanded_.as<bf16>(), width, nope + v};
    args.k_rope = {latents_.as<bf16>() + c.kv_lora_rank, latent, 0};
    args.v = {expanded_.as<bf16>() + nope, width, nope + v};
    args.out = heads_out_.as<bf16>() + pass.row_begin * heads * v;
    MK_RETURN_IF_ERROR(pass.prefill.Run(args, stream_));
  }
  return absl::OkStatus();
}

}  // namespace minke::cuda_model
