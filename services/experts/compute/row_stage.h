// What a launch on a GPU with row memory has to do with host memory: rows of messages that came there, and
// sums that are wanted there. It has rows of its own in the row memory for both, so that to the kernels all
// rows lie in one place. Built with CUDA only.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/transport/row_memory.h"

namespace minke::experts {

// Engine thread only. A launch: Begin, AddRow and AddSum, Upload, kernels, Download, wait, Deliver.
class RowStage {
 public:
  // For `rows_max` rows and as many sums of a launch. RESOURCE_EXHAUSTED, naming the flag: the row memory has
  // not enough free blocks. `rows` must outlive it.
  static absl::StatusOr<RowStage> Create(transport::RowMemory& rows, int32_t rows_max);

  void Begin();
  // Numbers of rows in row memory: that will have the bytes of `host`, and whose bytes `host` will get.
  int32_t AddRow(const std::byte* host);
  int32_t AddSum(std::byte* host);

  // In the order of the stream. `pool` copies between ordinary and page-locked memory.
  absl::Status Upload(ThreadPool& pool, const cuda::Stream& stream);
  absl::Status Download(const cuda::Stream& stream);
  void Deliver(ThreadPool& pool) const;

 private:
  struct Return {  // blocks to their memory
    transport::RowMemory* memory;
    void operator()(std::byte* block) const { memory->ReturnBlock(block); }
  };
  using Block = std::unique_ptr<std::byte, Return>;

  RowStage(transport::RowMemory& rows, int32_t rows_max) : rows_(&rows), rows_max_(rows_max) {}
  std::byte* Row(int32_t index) const;  // of ours: rows, then sums

  transport::RowMemory* rows_;
  int32_t rows_max_;
  std::vector<Block> blocks_;
  cuda::PinnedBuffer host_;   // [rows_max] rows, then [rows_max] sums
  cuda::PinnedBuffer moves_;  // cuda::RowMove, in the same order
  std::vector<const std::byte*> from_;
  std::vector<std::byte*> to_;
};

// copy(i) for all i below `count`, by threads in stretches of at most 128 KiB.
void CopyRows(ThreadPool& pool, int64_t count, int64_t row_bytes, absl::FunctionRef<void(int64_t)> copy);

}  // namespace minke::experts
