#include "libs/transport/frame_buffer.h"

#include <array>
#include <cstring>
#include <mutex>
#include <new>

#include "libs/base/status.h"

namespace minke::transport {
namespace internal {
namespace {

constexpr std::array<uint32_t, 5> kCapacities = {1024, 4096, 16384, 65536, wire::kPayloadBytesMax};
constexpr std::align_val_t kBlockAlignment{64};

uint32_t SizeClass(uint32_t payload_bytes) {
  uint32_t size_class = 0;
  while (kCapacities[size_class] < payload_bytes) ++size_class;
  return size_class;
}

}  // namespace

// Shared by the pool and its frames: deleted by whoever of them goes last.
class FramePoolState {
 public:
  FrameBlock* Take(uint32_t payload_bytes) {
    const uint32_t size_class = SizeClass(payload_bytes);
    holders_.fetch_add(1, std::memory_order_relaxed);
    FreeList& list = free_lists_[size_class];
    FrameBlock* block = nullptr;
    {
      const std::lock_guard lock(list.mutex);
      if (list.head != nullptr) {
        block = list.head;
        list.head = block->next_free;
      }
    }
    if (block == nullptr) {
      const size_t bytes = sizeof(FrameBlock) + kCapacities[size_class];
      block = new (::operator new(bytes, kBlockAlignment)) FrameBlock;
      block->size_class = size_class;
      block->capacity = kCapacities[size_class];
      block->pool = this;
      allocated_bytes_.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
    }
    block->references.store(1, std::memory_order_relaxed);
    block->header = wire::FrameHeader{};
    block->header.payload_bytes = payload_bytes;
    return block;
  }

  void Return(FrameBlock* block) {
    if (block->rows != nullptr) block->row_memory->ReturnBlock(std::exchange(block->rows, nullptr));
    block->row_memory = nullptr;
    FreeList& list = free_lists_[block->size_class];
    {
      const std::lock_guard lock(list.mutex);
      block->next_free = list.head;
      list.head = block;
    }
    DropHolder();
  }

  void DropHolder() {
    if (holders_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  int64_t allocated_bytes() const { return allocated_bytes_.load(std::memory_order_relaxed); }
  int64_t frames_in_use() const { return holders_.load(std::memory_order_relaxed) - 1; }

 private:
  // Critical sections of a few instructions; a mutex rather than a spin lock because the holder may be
  // descheduled where processes share few cores.
  struct alignas(64) FreeList {
    std::mutex mutex;
    FrameBlock* head = nullptr;
  };

  ~FramePoolState() {
    for (FreeList& list : free_lists_) {
      while (list.head != nullptr) {
        FrameBlock* const block = std::exchange(list.head, list.head->next_free);
        block->~FrameBlock();
        ::operator delete(block, kBlockAlignment);
      }
    }
  }

  std::array<FreeList, kCapacities.size()> free_lists_;
  alignas(64) std::atomic<int64_t> holders_{1};  // the pool, and each frame in use
  std::atomic<int64_t> allocated_bytes_{0};
};

void Release(FrameBlock* block) {
  if (block->references.fetch_sub(1, std::memory_order_acq_rel) == 1) block->pool->Return(block);
}

}  // namespace internal

FramePool::FramePool() : state_(new internal::FramePoolState) {}
FramePool::~FramePool() { state_->DropHolder(); }

FrameRef FramePool::Allocate(uint32_t payload_bytes) {
  MK_CHECK(payload_bytes <= wire::kPayloadBytesMax);
  return FrameRef(state_->Take(payload_bytes));
}

FrameRef FramePool::AllocateWithRows(uint32_t payload_bytes, uint32_t rows_offset, RowMemory& memory) {
  MK_CHECK(rows_offset <= payload_bytes && payload_bytes - rows_offset <= memory.block_bytes());
  std::byte* const rows = memory.TakeBlock();
  if (rows == nullptr) return FrameRef();
  internal::FrameBlock* const block = state_->Take(payload_bytes);
  block->rows = rows;
  block->rows_offset = rows_offset;
  block->row_memory = &memory;
  return FrameRef(block);
}

absl::StatusOr<FrameRef> FramePool::CopyToHost(const FrameRef& frame) {
  const wire::FrameHeader& header = frame.header();
  FrameRef copy = Allocate(header.payload_bytes);
  copy.header() = header;
  std::memcpy(copy.payload(), frame.payload(), frame.rows_offset());
  MK_RETURN_IF_ERROR(frame.row_memory()->CopyToHost(copy.payload() + frame.rows_offset(), frame.device_rows(),
                                                    header.payload_bytes - frame.rows_offset()));
  return copy;
}

int64_t FramePool::allocated_bytes() const { return state_->allocated_bytes(); }
int64_t FramePool::frames_in_use() const { return state_->frames_in_use(); }

}  // namespace minke::transport
