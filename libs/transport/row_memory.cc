#include "libs/transport/row_memory.h"

#include "libs/base/status.h"

namespace minke::transport {

RowMemory::RowMemory(std::byte* base, int64_t row_bytes, int32_t rows_per_block, int32_t blocks)
    : base_(base), row_bytes_(row_bytes), rows_per_block_(rows_per_block), blocks_(blocks) {
  MK_CHECK(row_bytes > 0 && row_bytes % 16 == 0 && rows_per_block > 0);
  free_.reserve(blocks);
  for (int32_t i = blocks; i-- > 0;) free_.push_back(i);
}

std::byte* RowMemory::TakeBlock() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return nullptr;
  const int32_t block = free_.back();
  free_.pop_back();
  return base_ + block * block_bytes();
}

void RowMemory::ReturnBlock(std::byte* block) {
  const std::lock_guard lock(mutex_);
  free_.push_back(static_cast<int32_t>((block - base_) / block_bytes()));
}

int32_t RowMemory::blocks_free() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int32_t>(free_.size());
}

}  // namespace minke::transport
