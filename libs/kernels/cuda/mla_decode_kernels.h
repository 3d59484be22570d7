// What mla_decode.cc hands to the kernels. For files of this folder only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "libs/kernels/cuda/mla_decode_plan.h"

namespace minke::cuda {

struct DecodeParams {
  const uint16_t* q;
  const uint16_t* cache;
  const uint32_t* page_table;
  int64_t page_table_stride;
  uint16_t* out;
  float* lse;
  float* partials;
  float* sums;
  const int32_t* worker_begin;
  const DecodeSegment* segments;
  float scale_log2;  // softmax_scale * log2(e)
  int32_t heads;
  int32_t item_rows;
};

struct CombineParams {
  uint16_t* out;
  float* lse;
  const float* partials;
  const float* sums;
  const int32_t*
      header;  // of the plan: combines, warps per row (1 or 8). Here, so that a graph follows the plan
  const DecodeCombine* combines;
  int32_t item_rows;
};

// Blocks of one worker in the Hopper variant: 2 read each page together, for 128 rows, else 1.
cudaError_t LaunchDecodeSm90(const DecodeParams& params, const CUtensorMap& q_map,
                             const CUtensorMap& page_map, int workers, int blocks_per_worker,
                             cudaStream_t stream);
cudaError_t LaunchDecodePortable(const DecodeParams& params, int workers, cudaStream_t stream);
// `overlapped`: the kernel before it in the stream lets it start early.
cudaError_t LaunchDecodeCombine(const CombineParams& params, int blocks, bool overlapped,
                                cudaStream_t stream);

}  // namespace minke::cuda
