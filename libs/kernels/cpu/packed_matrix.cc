#include "libs/kernels/cpu/packed_matrix.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "libs/base/mutex.h"
#include "libs/base/status.h"

namespace minke::kernels {
namespace {

constexpr int64_t kHugePage = 2 << 20;

int64_t BlockElements(Precision precision, int64_t k) {
  return kBlockColumns * (precision == Precision::kExact ? k : (k + 1) / 2 * 2);
}

}  // namespace

HugeBuffer::HugeBuffer(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // Small matrices keep ordinary pages: rounding each up to 2 MiB would multiply a small model's memory.
  const int64_t unit = bytes >= kHugePage ? kHugePage : 4096;
  mapped_bytes_ = (bytes + unit - 1) / unit * unit;
  void* mapped = ::mmap(nullptr, mapped_bytes_ + (unit == kHugePage ? kHugePage : 0), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<std::byte*>(mapped);
  if (unit == kHugePage) {
    auto* aligned =
        reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & ~(kHugePage - 1));
    if (aligned != begin) ::munmap(begin, aligned - begin);
    if (aligned - begin != kHugePage) ::munmap(aligned + mapped_bytes_, kHugePage - (aligned - begin));
    begin = aligned;
    ::madvise(begin, mapped_bytes_, MADV_HUGEPAGE);
  }
  data_ = begin;
}

HugeBuffer HugeBuffer::Shared(int64_t bytes) {
  // A chunk's tail that nobody fits in was never touched, so it costs nothing.
  constexpr int64_t kChunkBytes = 32 << 20, kAlone = kChunkBytes / 2, kAlignment = 64;
  if (bytes == 0 || bytes > kAlone) return HugeBuffer(bytes);
  static Mutex mutex;
  static std::weak_ptr<HugeBuffer> current;
  static int64_t used = 0;
  HugeBuffer buffer;
  buffer.bytes_ = bytes;
  const MutexLock lock(mutex);
  buffer.chunk_ = current.lock();
  if (buffer.chunk_ == nullptr || used + bytes > kChunkBytes) {
    buffer.chunk_ = std::make_shared<HugeBuffer>(kChunkBytes);
    current = buffer.chunk_;
    used = 0;
  }
  buffer.data_ = buffer.chunk_->data() + used;
  used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return buffer;
}

HugeBuffer::~HugeBuffer() {
  if (mapped_bytes_ != 0) ::munmap(data_, mapped_bytes_);
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept { *this = std::move(other); }

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(chunk_, other.chunk_);
  return *this;
}

PackedMatrix PackedMatrix::Empty(Precision precision, int64_t n, int64_t k) {
  PackedMatrix packed;
  packed.precision_ = precision;
  packed.n_ = n;
  packed.k_ = k;
  packed.storage_ =
      HugeBuffer::Shared(packed.blocks() * BlockElements(precision, k) * ActivationBytes(precision));
  return packed;
}

PackedMatrix PackedMatrix::Pack(Precision precision, int64_t n, int64_t k, RowReader read_row,
                                ThreadPool& pool) {
  PackedMatrix packed = Empty(precision, n, k);
  const int64_t block_elements = BlockElements(precision, k);
  pool.ParallelFor(packed.blocks(), [&](int64_t block) {
    std::vector<float> row(k);
    for (int64_t j = 0; j < std::min(kBlockColumns, n - block * kBlockColumns); ++j) {
      read_row(block * kBlockColumns + j, row);
      if (precision == Precision::kExact) {
        float* out = reinterpret_cast<float*>(packed.storage_.data()) + block * block_elements + j;
        for (int64_t p = 0; p < k; ++p) out[p * kBlockColumns] = row[p];
      } else {
        bf16* out = reinterpret_cast<bf16*>(packed.storage_.data()) + block * block_elements + 2 * j;
        for (int64_t p = 0; p < k; ++p) out[p / 2 * 2 * kBlockColumns + p % 2] = F32ToBF16(row[p]);
      }
    }
  });
  return packed;
}

PackedMatrix PackedMatrix::Pack(Precision precision, const TensorView& tensor, ThreadPool& pool) {
  MK_CHECK(tensor.shape.size() == 2);
  const int64_t k = tensor.shape[1];
  return Pack(
      precision, tensor.shape[0], k, [&](int64_t row, std::span<float> out) { tensor.Read(row * k, out); },
      pool);
}

const float* PackedMatrix::block_f32(int64_t block) const {
  return reinterpret_cast<const float*>(storage_.data()) + block * BlockElements(precision_, k_);
}

const bf16* PackedMatrix::block_bf16(int64_t block) const {
  return reinterpret_cast<const bf16*>(storage_.data()) + block * BlockElements(precision_, k_);
}

}  // namespace minke::kernels
