#include <algorithm>
#include <cstring>
#include <utility>

#include "libs/base/dtype.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/kernels/cuda/device.h"
#include "libs/kernels/cuda/graph.h"
#include "libs/kernels/cuda/row_copies.h"

namespace minke {
namespace {

class GpuRowCombiner final : public RowCombiner {
 public:
  GpuRowCombiner(int64_t width, int64_t rows_max, int64_t partials_max, int device, cuda::Stream stream,
                 cuda::PinnedBuffer begins, cuda::PinnedBuffer pointers, cuda::PinnedBuffer staging)
      : width_(width),
        rows_max_(rows_max),
        partials_max_(partials_max),
        device_(device),
        stream_(std::move(stream)),
        begins_(std::move(begins)),
        pointers_(std::move(pointers)),
        staging_(std::move(staging)) {}

  absl::Status Combine(std::span<const int32_t> begin, std::span<const PartialSum> partials,
                       float* sums) override {
    if (begin.empty() || std::ssize(begin) - 1 > rows_max_ ||
        std::ssize(partials) > rows_max_ * partials_max_ || begin.back() != std::ssize(partials)) {
      return absl::InvalidArgumentError(StrCat("Combine: ", begin.size(), " offsets, ", partials.size(),
                                               " partial sums, room for ", rows_max_ + 1, " and ",
                                               rows_max_ * partials_max_));
    }
    MK_ASSIGN_OR_RETURN(const cuda::DeviceScope scope, cuda::DeviceScope::Enter(device_));
    const int64_t row_bytes = width_ * int64_t{sizeof(bf16)};
    std::byte* staged = staging_.as<std::byte>();
    auto* pointer = pointers_.as<const bf16*>();
    std::copy(begin.begin(), begin.end(), begins_.as<int32_t>());
    for (const PartialSum& partial : partials) {
      const std::byte* row = partial.row;
      if (partial.in_host_memory) {
        std::memcpy(staged, row, row_bytes);
        row = std::exchange(staged, staged + row_bytes);
      }
      *pointer++ = reinterpret_cast<const bf16*>(row);
    }
    cuda::CombineArgs args;
    args.begin = begins_.as<int32_t>();
    args.partials = pointers_.as<const bf16*>();
    args.sums = sums;
    args.rows = std::ssize(begin) - 1;
    args.width = width_;
    MK_RETURN_IF_ERROR(cuda::CombineRows(args, stream_));
    return stream_.Synchronize();
  }

 private:
  const int64_t width_, rows_max_, partials_max_;
  const int device_;
  const cuda::Stream stream_;
  // The kernel reads them where they are.
  const cuda::PinnedBuffer begins_, pointers_, staging_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RowCombiner>> MakeGpuRowCombiner(int64_t width, int64_t rows_max,
                                                                int64_t partials_max) {
  if (width < 8 || width % 8 != 0 || rows_max < 1 || partials_max < 1) {
    return absl::InvalidArgumentError(
        StrCat("row combiner: ", rows_max, " rows of ", width, ", of ", partials_max, " partial sums each"));
  }
  MK_ASSIGN_OR_RETURN([[maybe_unused]] const int devices, cuda::DeviceCount());
  MK_ASSIGN_OR_RETURN(const int device, cuda::CurrentDeviceIndex());
  MK_ASSIGN_OR_RETURN(cuda::Stream stream, cuda::Stream::Create());
  const int64_t partials = rows_max * partials_max;
  MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer begins,
                      cuda::PinnedBuffer::Allocate((rows_max + 1) * int64_t{sizeof(int32_t)}));
  MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer pointers,
                      cuda::PinnedBuffer::Allocate(partials * int64_t{sizeof(void*)}));
  MK_ASSIGN_OR_RETURN(cuda::PinnedBuffer staging,
                      cuda::PinnedBuffer::Allocate(partials * width * int64_t{sizeof(bf16)}));
  return std::make_unique<GpuRowCombiner>(width, rows_max, partials_max, device, std::move(stream),
                                          std::move(begins), std::move(pointers), std::move(staging));
}

}  // namespace minke
