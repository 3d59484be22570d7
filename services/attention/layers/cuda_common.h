// What the models on a GPU share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "libs/base/status.h"
#include "libs/cuda_model/gpu_batch.h"
#include "services/attention/layers/attention_model.h"
#include "services/attention/layers/or_exit.h"

namespace minke::attention {

// Rows of one call of Logits by the engine (kLogitRowsMax there).
inline constexpr int64_t kLogitRowsMin = 64;

// For which giver and receiver of weights wait for each other, at the beginning and for every few tensors.
inline constexpr absl::Duration kTransferDeadline = absl::Seconds(60);

inline int64_t CacheBytes(const ModelConfig& c) {
  return int64_t{c.num_hidden_layers} * c.latent_dim() * ActivationBytes(Precision::kBF16);
}

// Tokens of the longest sequence there can be: a row of a decode step's page table is as long.
inline int64_t ContextMax(const ModelConfig& c, const ModelLimits& limits) {
  return std::min<int64_t>(limits.cache_pages * kernels::kPageTokens, c.max_position_embeddings);
}

// The tokens of a microbatch's chunks, as the GPU's batches take them.
class TokenSpans {
 public:
  explicit TokenSpans(const Microbatch& batch) {
    tokens_.reserve(batch.rows.size());
    for (const StepRow& row : batch.rows) tokens_.push_back(row.token);
  }
  cuda_model::GpuChunk Chunk(const kernels::MlaChunk& chunk) const { return Rows(chunk, 0, chunk.rows); }
  cuda_model::GpuChunk Rows(const kernels::MlaChunk& chunk, int64_t begin, int64_t count) const {
    return {{tokens_.data() + chunk.row_begin + begin, static_cast<size_t>(count)},
            chunk.position_begin + begin,
            chunk.pages};
  }

 private:
  std::vector<uint32_t> tokens_;
};

}  // namespace minke::attention
