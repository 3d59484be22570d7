// What a decode step (one token for each of B sequences) reads, for graphs whose addresses and sizes are
// fixed: B is rounded up to a bucket, and tokens, positions, pages and sampling parameters lie in one device
// buffer whose layout depends on the bucket, filled by one copy from page-locked memory. Rows that fill a
// bucket up sit on the scratch page and see one token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/cuda_model/gpu_batch.h"
#include "libs/kernels/cuda/sampling.h"

namespace minke::cuda_model {

// One token of one sequence.
struct DecodeInput {
  uint32_t token = 0;
  int64_t position = 0;             // of the token
  std::span<const uint32_t> pages;  // of the sequence, enough for position + 1 tokens
  cuda::SampleRow sampling;
};

// Rows that a graph is made for, ascending.
inline const std::vector<int32_t> kDecodeBuckets = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};

// Thread-compatible.
class DecodeInputs {
 public:
  struct Options {
    std::vector<int32_t> buckets;  // those above rows_max are left out
    int64_t rows_max = 0;
    int64_t context_max = 0;  // tokens of a sequence
    int64_t vocab = 0;
    uint32_t scratch_page = 0;  // behind the sequences' pages
  };
  static absl::StatusOr<DecodeInputs> Create(Options options);

  int32_t rows_max() const { return options_.buckets.back(); }  // of the largest bucket
  // The bucket for these rows. INVALID_ARGUMENT for more than rows_max, or a row outside the limits.
  absl::StatusOr<int32_t> BucketOf(std::span<const DecodeInput> inputs) const;

  // Fills the page-locked memory, which no copy may be reading.
  void Write(std::span<const DecodeInput> inputs, int32_t bucket);
  // Copies it to the device, in stream order. May be captured.
  absl::Status Upload(int32_t bucket, const Stream& stream);

  // Where it lies on the device.
  BatchView View(int32_t bucket) const;
  const cuda::SampleRow* sampling(int32_t bucket) const;
  // Of the rows written last, for MlaDecode's plan.
  const std::vector<cuda::DecodeSequence>& sequences() const { return sequences_; }

 private:
  struct Layout {
    Layout(int64_t rows, int64_t stride);
    int64_t tokens, positions, pages, sequences, sampling, used, page_table, bytes;
  };
  DecodeInputs() = default;

  Options options_;
  int64_t stride_ = 0;  // of the page table
  DeviceBuffer device_;
  cuda::PinnedBuffer host_;
  std::vector<cuda::DecodeSequence> sequences_;
};

}  // namespace minke::cuda_model
