// Memory for the rows of frames that is not the host's: a GPU's. One allocation, cut into blocks that hold
// the rows of one message; a frame whose rows lie here owns a block until its last reference goes. Rows have
// numbers in it, so that a kernel takes them where they lie.
//
// Who has one gives it to the transport (TransportOptions): what arrives then comes to lie here where UCX can
// do so, in host memory otherwise, and a reader must take both. docs/gpu.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "absl/status/status.h"

namespace minke::transport {

// A row on its way; `to` is in the row memory.
struct RowCopy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  bool from_host = false;  // else the device's, not only this memory's
};

// Must outlive the transport and all frames. Thread-safe, but CopyRows: engine thread only.
class RowMemory {
 public:
  virtual ~RowMemory() = default;
  RowMemory(const RowMemory&) = delete;
  RowMemory& operator=(const RowMemory&) = delete;

  // False for tests, whose row memory is the host's.
  virtual bool on_gpu() const = 0;
  // Makes the device the calling thread's current one. The transport calls it in every thread that lets UCX
  // work, before it does: UCX asks CUDA for that device, and has none of its own.
  virtual void UseInThisThread() {}
  // Waits until the bytes are in host memory. (Both: a GPU that fails ends the process, with a line in the
  // log.)
  virtual absl::Status CopyToHost(std::byte* to, const std::byte* from, size_t bytes) = 0;
  // Copies rows of row_bytes() and waits. Host rows need not be page-locked.
  virtual absl::Status CopyRows(std::span<const RowCopy> copies) = 0;

  int64_t row_bytes() const { return row_bytes_; }
  int32_t rows_per_block() const { return rows_per_block_; }
  int64_t block_bytes() const { return row_bytes_ * rows_per_block_; }
  int64_t bytes() const { return block_bytes() * blocks_; }
  std::byte* base() const { return base_; }
  // Whether `bytes` are so many rows of ours, and fit a block.
  bool Fits(uint32_t rows, uint64_t bytes) const {
    return rows > 0 && rows <= static_cast<uint32_t>(rows_per_block_) &&
           bytes == rows * static_cast<uint64_t>(row_bytes_);
  }
  // Number of a row of this memory: row n lies n * row_bytes() behind base().
  int64_t RowNumber(const std::byte* row) const { return (row - base_) / row_bytes_; }

  // Null: all blocks are in use; take host memory then.
  std::byte* TakeBlock();
  void ReturnBlock(std::byte* block);
  int32_t blocks_free() const;

 protected:
  // Rows of `row_bytes`, a multiple of 16; `base` has blocks * rows_per_block of them.
  RowMemory(std::byte* base, int64_t row_bytes, int32_t rows_per_block, int32_t blocks);

 private:
  std::byte* const base_;
  const int64_t row_bytes_;
  const int32_t rows_per_block_, blocks_;
  mutable std::mutex mutex_;
  std::vector<int32_t> free_;  // the last one returned is taken first: it is the likeliest in a cache
};

}  // namespace minke::transport
