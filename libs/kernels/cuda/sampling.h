// Logits to tokens on the device: the greedy choice, and temperature, top-k, top-p and min-p with the draw of
// services/attention/sampling, f(seed, position), so that a request that moves between nodes and devices goes
// on with the same sequence. Penalties, biases and log-probabilities are the host sampler's: download the
// logits for those.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

// Read by the kernel. Meaning of every field: proto/inference/inference.proto, SamplingParams.
struct SampleRow {
  uint64_t seed = 0;
  int64_t position = 0;   // of the new token in its sequence
  float temperature = 0;  // 0: greedy; the rest is then ignored
  float top_p = 1;
  float min_p = 0;
  uint32_t top_k = 0;  // 0: no limit
};
static_assert(sizeof(SampleRow) == 32);

struct SampleArgs {
  // All on the device.
  const float* logits = nullptr;      // [rows, vocab]
  const SampleRow* params = nullptr;  // [rows]
  const uint8_t* allowed = nullptr;   // [vocab], 0: never chosen; null: all may be
  uint32_t* tokens = nullptr;         // [rows]
  int64_t rows = 0, vocab = 0;        // vocab: at most 2^18
};

inline constexpr uint32_t kNoToken = 0xffffffff;

// Ties go to the lower id. A row with a NaN among its allowed logits gives kNoToken: its forward pass has
// failed. Weights are counted in integers, so the result does not depend on the order of addition.
absl::Status SampleTokens(const SampleArgs& args, const Stream& stream);

}  // namespace minke::cuda
