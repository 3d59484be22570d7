// Reference-counted message buffers from a pool: header and payload together, so that a message has one owner
// from the moment its rows are computed until its last send request completes, and is never copied on the
// way.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "libs/transport/row_memory.h"
#include "libs/wire/frame.h"

namespace minke::transport {

namespace internal {
class FramePoolState;

struct FrameBlock {
  std::atomic<uint32_t> references{0};
  uint32_t size_class = 0;
  uint32_t capacity = 0;           // payload bytes
  FramePoolState* pool = nullptr;  // lives until the pool and its last frame are gone
  FrameBlock* next_free = nullptr;
  RowMemory* row_memory = nullptr;  // that `rows` is a block of
  std::byte* rows = nullptr;        // null: in the payload
  uint32_t rows_offset = 0;         // of the rows in the payload
  alignas(64) wire::FrameHeader header;
  // payload follows, 64-byte aligned
};
void Release(FrameBlock* block);
}  // namespace internal

// Shared handle; copying adds a reference. Contents may be written only before Send() and by one thread;
// after that, and in received frames (inproc hands over the sender's own), they are read-only. Thread-safe
// like shared_ptr.
class FrameRef {
 public:
  FrameRef() = default;
  explicit FrameRef(internal::FrameBlock* block) : block_(block) {}  // takes over one reference
  FrameRef(const FrameRef& other) : block_(other.block_) {
    if (block_ != nullptr) block_->references.fetch_add(1, std::memory_order_relaxed);
  }
  FrameRef(FrameRef&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  FrameRef& operator=(FrameRef other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~FrameRef() {
    if (block_ != nullptr) internal::Release(block_);
  }

  explicit operator bool() const { return block_ != nullptr; }
  wire::FrameHeader& header() const { return block_->header; }
  std::byte* payload() const { return reinterpret_cast<std::byte*>(block_ + 1); }
  std::span<std::byte> payload_span() const { return {payload(), block_->header.payload_bytes}; }
  uint32_t capacity() const { return block_->capacity; }
  // Where the row data are if they are in row memory; null: in the payload, as everything else. If they are
  // there, the payload's bytes from rows_offset() on, although payload_bytes counts them, mean nothing.
  std::byte* device_rows() const { return block_->rows; }
  uint32_t rows_offset() const { return block_->rows_offset; }
  RowMemory* row_memory() const { return block_->row_memory; }
  // Gives up the handle without dropping its reference (for passing through C callbacks).
  internal::FrameBlock* Detach() { return std::exchange(block_, nullptr); }

 private:
  internal::FrameBlock* block_ = nullptr;
};
static_assert(sizeof(internal::FrameBlock) % 64 == 0);

// Size classes 1 KiB, 4 KiB, 16 KiB, 64 KiB, 256 KiB of payload. The pool grows to the high-water mark and
// then allocates nothing. Thread-safe. Frames may outlive the pool: the last one frees what it held.
class FramePool {
 public:
  FramePool();
  ~FramePool();
  FramePool(const FramePool&) = delete;
  FramePool& operator=(const FramePool&) = delete;

  // A frame with a default header (payload_bytes = `payload_bytes`) and an uninitialised payload.
  // REQUIRES: payload_bytes <= wire::kPayloadBytesMax.
  FrameRef Allocate(uint32_t payload_bytes);
  // The same, with a block of `memory` for the row data behind the first `rows_offset` bytes; an empty handle
  // if all blocks are in use. REQUIRES: the rows fit a block.
  FrameRef AllocateWithRows(uint32_t payload_bytes, uint32_t rows_offset, RowMemory& memory);
  // A frame that says the same with its rows in the payload. Waits for the GPU; the row memory's errors.
  // REQUIRES: frame.device_rows() is not null.
  absl::StatusOr<FrameRef> CopyToHost(const FrameRef& frame);

  int64_t allocated_bytes() const;  // held from the system
  int64_t frames_in_use() const;    // references still out: 0 when idle, for leak tests

 private:
  internal::FramePoolState* const state_;
};

}  // namespace minke::transport
