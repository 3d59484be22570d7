#include "services/experts/compute/row_stage.h"

#include <algorithm>
#include <cstring>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/kernels/cuda/row_copies.h"

namespace minke::experts {
namespace {

// What one thread copies at a time.
constexpr int64_t kCopyBytes = 128 << 10;

}  // namespace

void CopyRows(ThreadPool& pool, int64_t count, int64_t row_bytes, absl::FunctionRef<void(int64_t)> copy) {
  const int64_t grain = std::max<int64_t>(1, kCopyBytes / row_bytes);
  pool.ParallelFor((count + grain - 1) / grain, [&](int64_t task) {
    for (int64_t i = task * grain; i < std::min(count, (task + 1) * grain); ++i) copy(i);
  });
}

absl::StatusOr<RowStage> RowStage::Create(transport::RowMemory& rows, int32_t rows_max) {
  RowStage stage(rows, rows_max);
  const int32_t blocks = (2 * rows_max + rows.rows_per_block() - 1) / rows.rows_per_block();
  while (std::ssize(stage.blocks_) < blocks) {
    std::byte* const block = rows.TakeBlock();
    if (block == nullptr) {
      return absl::ResourceExhaustedError(
          StrCat("the row memory has ", rows.bytes() >> 20, " MiB, and launches alone need ",
                 (blocks * rows.block_bytes() >> 20) + 1, " MiB of it; see --row-memory-mib"));
    }
    stage.blocks_.emplace_back(block, Return{&rows});
  }
  MK_ASSIGN_OR_RETURN(stage.host_, cuda::PinnedBuffer::Allocate(2 * rows_max * rows.row_bytes()));
  MK_ASSIGN_OR_RETURN(stage.moves_,
                      cuda::PinnedBuffer::Allocate(2 * int64_t{rows_max} * int64_t{sizeof(cuda::RowMove)}));
  return stage;
}

std::byte* RowStage::Row(int32_t index) const {
  const int32_t per_block = rows_->rows_per_block();
  return blocks_[index / per_block].get() + index % per_block * rows_->row_bytes();
}

void RowStage::Begin() {
  from_.clear();
  to_.clear();
}

int32_t RowStage::AddRow(const std::byte* host) {
  MK_CHECK(std::ssize(from_) < rows_max_);
  std::byte* const row = Row(static_cast<int32_t>(from_.size()));
  from_.push_back(host);
  return static_cast<int32_t>(rows_->RowNumber(row));
}

int32_t RowStage::AddSum(std::byte* host) {
  MK_CHECK(std::ssize(to_) < rows_max_);
  std::byte* const row = Row(rows_max_ + static_cast<int32_t>(to_.size()));
  to_.push_back(host);
  return static_cast<int32_t>(rows_->RowNumber(row));
}

absl::Status RowStage::Upload(ThreadPool& pool, const cuda::Stream& stream) {
  const int64_t row_bytes = rows_->row_bytes();
  auto* const moves = moves_.as<cuda::RowMove>();
  CopyRows(pool, std::ssize(from_), row_bytes, [&](int64_t i) {
    std::byte* const page_locked = host_.as<std::byte>() + i * row_bytes;
    std::memcpy(page_locked, from_[i], row_bytes);
    moves[i] = {Row(static_cast<int32_t>(i)), page_locked};
  });
  return cuda::MoveRows(moves, std::ssize(from_), row_bytes, stream);
}

absl::Status RowStage::Download(const cuda::Stream& stream) {
  auto* const moves = moves_.as<cuda::RowMove>() + rows_max_;
  for (int32_t i = 0; i < std::ssize(to_); ++i) {
    moves[i] = {host_.as<std::byte>() + (rows_max_ + i) * rows_->row_bytes(), Row(rows_max_ + i)};
  }
  return cuda::MoveRows(moves, std::ssize(to_), rows_->row_bytes(), stream);
}

void RowStage::Deliver(ThreadPool& pool) const {
  const int64_t row_bytes = rows_->row_bytes();
  CopyRows(pool, std::ssize(to_), row_bytes, [&](int64_t i) {
    std::memcpy(to_[i], host_.as<std::byte>() + (rows_max_ + i) * row_bytes, row_bytes);
  });
}

}  // namespace minke::experts
