#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/row_copies.h"

namespace minke {
namespace {

using transport::RowCopy;
using transport::RowMemory;

// Of one kernel; more take several. 64 KiB of table: what a prefill step of V2 sends, 512 rows to three
// groups each, takes one.
constexpr int64_t kMovesMax = 4096;
constexpr int64_t kStagingBytes = 8 << 20;

class GpuRowMemory final : public RowMemory {
 public:
  GpuRowMemory(cuda::DeviceBuffer memory, int64_t row_bytes, int32_t rows_per_block, int32_t blocks,
               int device, cuda::Stream copies, cuda::Stream downloads, cuda::PinnedBuffer moves,
               cuda::PinnedBuffer staging)
      : RowMemory(memory.as<std::byte>(), row_bytes, rows_per_block, blocks),
        memory_(std::move(memory)),
        device_(device),
        copies_(std::move(copies)),
        downloads_(std::move(downloads)),
        moves_(std::move(moves)),
        staging_(std::move(staging)),
        staged_max_(staging_.bytes() / row_bytes) {}

  bool on_gpu() const override { return true; }
  // A device that cannot be used now fails in whatever is done with it next.
  void UseInThisThread() override { (void)cuda::UseDevice(device_); }

  // On a stream of its own: the transport's keepalive thread may need it while the engine copies.
  absl::Status CopyToHost(std::byte* to, const std::byte* from, size_t bytes) override {
    return OrExit(TryCopyToHost(to, from, bytes));
  }
  absl::Status CopyRows(std::span<const RowCopy> copies) override { return OrExit(TryCopyRows(copies)); }

 private:
  // A GPU's errors stay: every later call of the process fails too, and its peers would go on sending to it.
  static absl::Status OrExit(absl::Status status) {
    if (status.ok()) return status;
    log::Error("rows", StrCat("the GPU is lost, this process ends: ", status.message()));
    ::_exit(1);  // destructors would only fail on the device too
  }

  absl::Status TryCopyToHost(std::byte* to, const std::byte* from, size_t bytes) {
    MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(device_));
    MK_RETURN_IF_ERROR(cuda::CopyToHost(to, from, static_cast<int64_t>(bytes), downloads_));
    return downloads_.Synchronize();
  }

  absl::Status TryCopyRows(std::span<const RowCopy> copies) {
    const std::lock_guard lock(copying_);
    MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(device_));
    auto* const moves = moves_.as<cuda::RowMove>();
    while (!copies.empty()) {
      int64_t count = 0, staged = 0;
      for (; count < std::min(kMovesMax, std::ssize(copies)); ++count) {
        const RowCopy& copy = copies[count];
        const std::byte* from = copy.from;
        if (copy.from_host) {
          if (staged == staged_max_) break;
          std::byte* const page_locked = staging_.as<std::byte>() + staged++ * row_bytes();
          std::memcpy(page_locked, from, row_bytes());
          from = page_locked;
        }
        moves[count] = {copy.to, from};
      }
      MK_RETURN_IF_ERROR(cuda::MoveRows(moves, count, row_bytes(), copies_));
      MK_RETURN_IF_ERROR(copies_.Synchronize());
      copies = copies.subspan(count);
    }
    return absl::OkStatus();
  }

  const cuda::DeviceBuffer memory_;
  const int device_;
  const cuda::Stream copies_, downloads_;
  const cuda::PinnedBuffer moves_, staging_;
  const int64_t staged_max_;
  std::mutex copying_;  // several engines of one process (tests) may share a row memory
};

}  // namespace

absl::StatusOr<std::unique_ptr<RowMemory>> MakeGpuRowMemory(int64_t row_bytes, int32_t rows_per_block,
                                                            int32_t blocks) {
  const int64_t bytes = row_bytes * rows_per_block * blocks;
  if (row_bytes < 16 || row_bytes % 16 != 0 || row_bytes > kStagingBytes || rows_per_block < 1 ||
      blocks < 1 || int64_t{rows_per_block} * blocks > INT32_MAX) {
    return absl::InvalidArgumentError(
        StrCat("row memory: ", blocks, " blocks of ", rows_per_block, " rows of ", row_bytes, " bytes"));
  }
  MK_ASSIGN_OR_RETURN([[maybe_unused]] const int devices, cuda::DeviceCount());
  MK_ASSIGN_OR_RETURN(const int device, cuda::CurrentDeviceIndex());
  MK_ASSIGN_OR_RETURN(cuda::Stream copies, cuda::Stream::Create());
  MK_ASSIGN_OR_RETURN(cuda::Stream downloads, cuda::Stream::Create());
  MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer moves,
                      cuda::PinnedBuffer::Allocate(kMovesMax * int64_t{sizeof(cuda::RowMove)}));
  MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer staging, cuda::PinnedBuffer::Allocate(kStagingBytes));
  absl::StatusOr<cuda::DeviceBuffer> memory = cuda::DeviceBuffer::Allocate(bytes);
  if (absl::IsResourceExhausted(memory.status())) {
    return absl::ResourceExhaustedError(
        StrCat("out of GPU memory: the row memory needs ", bytes, " bytes: ", memory.status().message()));
  }
  MK_RETURN_IF_ERROR(memory.status());
  return std::make_unique<GpuRowMemory>(*std::move(memory), row_bytes, rows_per_block, blocks, device,
                                        std::move(copies), std::move(downloads), std::move(moves),
                                        std::move(staging));
}

}  // namespace minke
