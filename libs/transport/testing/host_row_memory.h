// Row memory in host memory: what tests, which have no GPU, use in its place.
#pragma once

#include <cstring>
#include <memory>

#include "libs/transport/row_memory.h"

namespace minke::transport {

// Blocks are poisoned, so that rows which nobody wrote are not numbers.
class HostRowMemory final : public RowMemory {
 public:
  HostRowMemory(int64_t row_bytes, int32_t rows_per_block, int32_t blocks)
      : HostRowMemory(std::make_unique<std::byte[]>(row_bytes * rows_per_block * blocks), row_bytes,
                      rows_per_block, blocks) {}

  bool on_gpu() const override { return false; }
  absl::Status CopyToHost(std::byte* to, const std::byte* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  }
  absl::Status CopyRows(std::span<const RowCopy> copies) override {
    for (const RowCopy& copy : copies) std::memcpy(copy.to, copy.from, row_bytes());
    return absl::OkStatus();
  }

 private:
  HostRowMemory(std::unique_ptr<std::byte[]> memory, int64_t row_bytes, int32_t rows_per_block,
                int32_t blocks)
      : RowMemory(memory.get(), row_bytes, rows_per_block, blocks), memory_(std::move(memory)) {
    std::memset(memory_.get(), 0xff, bytes());
  }
  const std::unique_ptr<std::byte[]> memory_;
};

}  // namespace minke::transport
