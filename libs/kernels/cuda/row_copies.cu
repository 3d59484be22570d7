#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/row_copies.h"

namespace minke::cuda {
namespace {

constexpr int kThreads = 256;
// 16-byte pieces on their way per thread before the first is written: a row of V2 is 640 of them.
constexpr int kPieces = 4;

__global__ void __launch_bounds__(kThreads) MoveKernel(const RowMove* moves, int pieces) {
  const RowMove move = moves[blockIdx.x];
  const uint4* from = static_cast<const uint4*>(move.from);
  uint4* to = static_cast<uint4*>(move.to);
  for (int begin = threadIdx.x; begin < pieces; begin += kPieces * kThreads) {
    uint4 piece[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (begin + i * kThreads < pieces) piece[i] = from[begin + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (begin + i * kThreads < pieces) to[begin + i * kThreads] = piece[i];
    }
  }
}

// A block has one row's stretch of 8 * kThreads columns.
__global__ void __launch_bounds__(kThreads) CombineKernel(const CombineArgs a) {
  const int64_t row = blockIdx.x, column = 8 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  if (column >= a.width) return;
  const int32_t begin = a.begin[row], end = a.begin[row + 1];
  if (begin == end && a.add) return;
  float sum[8] = {};
  for (int32_t p = begin; p < end; ++p) {
    const uint4 packed = *reinterpret_cast<const uint4*>(a.partials[p] + column);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __uint_as_float(words[i] << 16), high = __uint_as_float(words[i] & 0xffff0000u);
      sum[2 * i] = p == begin ? low : sum[2 * i] + low;
      sum[2 * i + 1] = p == begin ? high : sum[2 * i + 1] + high;
    }
  }
  float4* const to = reinterpret_cast<float4*>(a.sums + row * a.width + column);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // 0 + sum, not sum: a sum of -0 added to zeroes is 0.
    float4 x = a.add ? to[half] : make_float4(0, 0, 0, 0);
    x.x += sum[4 * half], x.y += sum[4 * half + 1], x.z += sum[4 * half + 2], x.w += sum[4 * half + 3];
    to[half] = x;
  }
}

absl::Status Launched() {
  MK_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace

absl::Status MoveRows(const RowMove* moves, int64_t count, int64_t row_bytes, const Stream& stream) {
  if (count == 0) return absl::OkStatus();
  if (row_bytes % 16 != 0) return absl::InvalidArgumentError("MoveRows: rows are not multiples of 16 bytes");
  MoveKernel<<<static_cast<unsigned>(count), kThreads, 0, stream.handle()>>>(moves, static_cast<int>(row_bytes / 16));
  return Launched();
}

absl::Status CopyToHost(void* to, const void* from, int64_t bytes, const Stream& stream) {
  MK_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream.handle()));
  return absl::OkStatus();
}

absl::Status CombineRows(const CombineArgs& args, const Stream& stream) {
  if (args.rows == 0) return absl::OkStatus();
  if (args.width % 8 != 0) return absl::InvalidArgumentError("CombineRows: the width is no multiple of 8");
  const auto stretches = static_cast<unsigned>((args.width / 8 + kThreads - 1) / kThreads);
  CombineKernel<<<dim3(static_cast<unsigned>(args.rows), stretches), kThreads, 0, stream.handle()>>>(args);
  return Launched();
}

}  // namespace minke::cuda
