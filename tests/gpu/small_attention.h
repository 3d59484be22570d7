// An attention node's part of a small model on the GPU.
#pragma once

#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/model/checkpoint.h"

namespace minke::cuda_model {

inline absl::StatusOr<AttentionWeights> WeightsFromDisk(const Checkpoint& checkpoint, kernels::Share share) {
  const Stream loading = Stream::Create().value();
  CheckpointSource source = CheckpointSource::Create(checkpoint).value();
  return AttentionWeights::Load(
      checkpoint.config(), source, loading, [](int32_t) {}, share);
}

inline AttentionOnGpu::Options SmallOptions() {
  AttentionOnGpu::Options options;
  options.rows_max = 256;
  options.sequences_max = 16;
  options.cache_pages = 16;
  options.prefill_keys_max = 320;
  return options;
}

}  // namespace minke::cuda_model
