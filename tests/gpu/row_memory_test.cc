#include <algorithm>
#include <cstring>
#include <numeric>

#include "libs/gpu_rows/gpu_rows.h"
#include "libs/gpu_rows/testing/host_row_combiner.h"
#include "libs/kernels/cuda/row_copies.h"
#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;
using transport::RowCopy;
using transport::RowMemory;

std::vector<std::byte> RandomBytes(std::mt19937& rng, int64_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  return bytes;
}

std::vector<std::byte> Contents(RowMemory& memory) {
  std::vector<std::byte> bytes(memory.bytes());
  EXPECT_TRUE(memory.CopyToHost(bytes.data(), memory.base(), bytes.size()).ok());
  return bytes;
}

TEST(GpuRowMemory, RowsThatAreNoMultipleOf16BytesAreRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(MakeGpuRowMemory(24, 4, 4).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MakeGpuRowMemory(32, 0, 4).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MakeGpuRowMemory(32, 1 << 20, 1 << 20).status()));
}

TEST(GpuRowMemory, TooMuchSaysHowMuch) {
  const auto memory = MakeGpuRowMemory(1 << 20, 1024, 1 << 20);
  ASSERT_TRUE(absl::IsResourceExhausted(memory.status())) << memory.status();
  EXPECT_NE(memory.status().message().find("1125899906842624"), std::string::npos) << memory.status();
}

TEST(GpuRowMemory, OtherMemoryOfTheDeviceIsCopiedToTheHostToo) {
  std::mt19937 rng(10);
  const Stream stream = *Stream::Create();
  const auto memory = MakeGpuRowMemory(32, 2, 2);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto other = RandomBytes(rng, 4096);
  const DeviceBuffer device = ToDevice(other, stream);
  ASSERT_TRUE(stream.Synchronize().ok());
  std::vector<std::byte> out(4000);
  ASSERT_TRUE((*memory)->CopyToHost(out.data(), device.as<std::byte>() + 96, out.size()).ok());
  EXPECT_TRUE(std::equal(out.begin(), out.end(), other.begin() + 96));
}

// Rows from ordinary host memory, from this memory and from elsewhere on the GPU, in any number: against a
// loop over the same moves on the host.
TEST(GpuRowMemory, CopiesAreALoops) {
  std::mt19937 rng(11);
  const Stream stream = *Stream::Create();
  // More host rows than the staging holds, and more moves than a table, are among them.
  for (const int64_t row_bytes : {16, 48, 1024, 4096, 10240, 16384 + 16, 1 << 20}) {
    const int32_t rows = static_cast<int32_t>(std::min<int64_t>(20000, (64 << 20) / row_bytes));
    auto made = MakeGpuRowMemory(row_bytes, rows / 4, 4);
    ASSERT_TRUE(made.ok()) << made.status();
    RowMemory& memory = **made;
    EXPECT_TRUE(memory.on_gpu());
    const int32_t half = rows / 4 * 2;  // rows below are written, those above only read
    const auto host = RandomBytes(rng, half * row_bytes), other = RandomBytes(rng, 64 * row_bytes);
    const DeviceBuffer device = ToDevice(other, stream);
    ASSERT_TRUE(stream.Synchronize().ok());
    std::vector<RowCopy> fill;
    for (int32_t i = 0; i < half; ++i)
      fill.push_back({memory.base() + (half + i) * row_bytes, host.data() + i * row_bytes, true});
    ASSERT_TRUE(memory.CopyRows(fill).ok());
    std::vector<std::byte> want = Contents(memory);
    ASSERT_EQ(std::memcmp(want.data() + half * row_bytes, host.data(), host.size()), 0) << row_bytes;

    for (const int count : {0, 1, 2, 7, 100, half}) {
      std::vector<int32_t> targets(half);
      std::iota(targets.begin(), targets.end(), 0);
      std::shuffle(targets.begin(), targets.end(), rng);
      std::vector<RowCopy> copies;
      for (int i = 0; i < std::min(count, half); ++i) {
        RowCopy copy = {.to = memory.base() + targets[i] * row_bytes};
        const std::byte* value = nullptr;
        switch (rng() % 3) {
          case 0:
            copy.from = value = host.data() + rng() % half * row_bytes;
            copy.from_host = true;
            break;
          case 1: {
            const int64_t row = half + rng() % half;
            copy.from = memory.base() + row * row_bytes;
            value = want.data() + row * row_bytes;
            break;
          }
          default: {
            const int64_t row = rng() % 64;
            copy.from = device.as<std::byte>() + row * row_bytes;
            value = other.data() + row * row_bytes;
          }
        }
        std::memcpy(want.data() + targets[i] * row_bytes, value, row_bytes);
        copies.push_back(copy);
      }
      const absl::Status copied = memory.CopyRows(copies);
      ASSERT_TRUE(copied.ok()) << copied;
      ASSERT_EQ(Contents(memory), want) << row_bytes << " bytes, " << copies.size() << " rows";
    }
  }
}

// Partial sums in row memory and in ordinary host memory, mixed: against the loop on the host.
TEST(GpuRowCombiner, AddsAsTheHost) {
  std::mt19937 rng(13);
  const Stream stream = *Stream::Create();
  for (const int64_t width : {8, 96, 2048, 5120, 7176}) {
    constexpr int32_t kRows = 300;
    std::vector<bf16> values = RandomBF16(rng, kRows * width, 3);
    std::fill_n(values.begin(), width, F32ToBF16(-0.0f));  // row 0
    const DeviceBuffer device = ToDevice(values, stream);
    auto combiner = MakeGpuRowCombiner(width, 130, 8);
    ASSERT_TRUE(combiner.ok()) << combiner.status();
    HostRowCombiner reference(width, Precision::kBF16);
    for (const int rows : {1, 2, 17, 64, 130}) {
      std::vector<int32_t> begin = {0};
      std::vector<PartialSum> partials, on_host;
      for (int i = 0; i < rows; ++i) {
        for (int count = static_cast<int>(rng() % 9); count > 0; --count) {  // none, too
          const int64_t row = partials.empty() ? 0 : static_cast<int64_t>(rng() % kRows);
          on_host.push_back({reinterpret_cast<const std::byte*>(&values[row * width]), true});
          partials.push_back(rng() % 2 == 0 ? on_host.back()
                                            : PartialSum{device.as<std::byte>() + row * width * 2, false});
        }
        begin.push_back(static_cast<int32_t>(partials.size()));
      }
      std::vector<float> want(rows * width);
      ASSERT_TRUE(reference.Combine(begin, on_host, want.data()).ok());
      const DeviceBuffer sums = Poisoned(rows * width * 4, stream);
      ASSERT_TRUE(stream.Synchronize().ok());
      const absl::Status combined = (*combiner)->Combine(begin, partials, sums.as<float>());
      ASSERT_TRUE(combined.ok()) << combined;
      const auto got = ToHost<float>(sums, stream);
      ASSERT_EQ(std::memcmp(got.data(), want.data(), want.size() * 4), 0) << width << " x " << rows;
    }
    const std::vector<int32_t> too_many(132);
    EXPECT_TRUE(absl::IsInvalidArgument((*combiner)->Combine(too_many, {}, nullptr)));
    EXPECT_TRUE(absl::IsInvalidArgument((*combiner)->Combine(std::vector<int32_t>{0, 1}, {}, nullptr)));
  }
}

// The form that adds: what is there, then the sum, rounded once.
TEST(CombineRowsTest, AddsToWhatIsThere) {
  std::mt19937 rng(17);
  const Stream stream = *Stream::Create();
  constexpr int64_t kWidth = 2056;
  const auto values = RandomBF16(rng, 4 * kWidth, 3), before = RandomBF16(rng, 3 * kWidth, 5);
  std::vector<float> x(before.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = BF16ToF32(before[i]) * 1.001f;
  const std::vector<int32_t> begin = {0, 3, 3, 4};
  const DeviceBuffer rows = ToDevice(values, stream), sums = ToDevice(x, stream);
  std::vector<const bf16*> partials;
  for (const int row : {2, 0, 3, 1}) partials.push_back(rows.as<bf16>() + row * kWidth);
  const DeviceBuffer begins = ToDevice(begin, stream), pointers = ToDevice(partials, stream);
  ASSERT_TRUE(CombineRows({.begin = begins.as<int32_t>(),
                           .partials = pointers.as<const bf16*>(),
                           .sums = sums.as<float>(),
                           .rows = 3,
                           .width = kWidth,
                           .add = true},
                          stream)
                  .ok());
  for (int64_t i = 0; i < kWidth; ++i) {
    const auto at = [&](int row) { return BF16ToF32(values[row * kWidth + i]); };
    const float first = at(2) + at(0);
    const float sum = first + at(3);
    x[i] += sum;
    x[2 * kWidth + i] += at(1);
  }
  EXPECT_EQ(ToHost<float>(sums, stream), x);
}

}  // namespace
}  // namespace minke::cuda
