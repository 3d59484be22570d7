#include <algorithm>
#include <cstring>
#include <numeric>

#include "libs/gpu_rows/gpu_rows.h"
#include "libs/gpu_rows/testing/host_row_combiner.h"
#include "libs/kernels/cuda/row_copies.h"
#include "libs/transport/testing/host_row_memory.h"
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

TEST(GpuRowMemory, BytesOutsideAreNotCopiedToTheHost) {
  const auto memory = MakeGpuRowMemory(32, 2, 2);
  ASSERT_TRUE(memory.ok()) << memory.status();
  std::byte out[64];
  EXPECT_FALSE((*memory)->CopyToHost(out, (*memory)->base() + 96, 64).ok());
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

TEST(GpuRowMemory, CombinesAsTheHost) {
  std::mt19937 rng(13);
  const Stream stream = *Stream::Create();
  for (const int64_t width : {8, 96, 2048, 5120, 7176}) {
    constexpr int32_t kRows = 300;
    auto memory = MakeGpuRowMemory(width * 2, kRows, 1);
    ASSERT_TRUE(memory.ok()) << memory.status();
    transport::HostRowMemory host(width * 2, kRows, 1);
    std::vector<bf16> values = RandomBF16(rng, kRows * width, 3);
    for (int64_t i = 0; i < width; ++i) values[i] = F32ToBF16(-0.0f);  // row 0
    std::memcpy(host.base(), values.data(), host.bytes());
    std::vector<RowCopy> fill;
    for (int32_t i = 0; i < kRows; ++i)
      fill.push_back({(*memory)->base() + i * width * 2, host.base() + i * width * 2, true});
    ASSERT_TRUE((*memory)->CopyRows(fill).ok());
    auto combiner = MakeGpuRowCombiner(**memory, 130, 8);
    ASSERT_TRUE(combiner.ok()) << combiner.status();
    HostRowCombiner reference(host);
    for (const int rows : {1, 2, 17, 64, 130}) {
      std::vector<int32_t> begin = {0}, partials;
      for (int i = 0; i < rows; ++i) {
        const int count = static_cast<int>(rng() % 9);  // none, too
        for (int p = 0; p < count; ++p) partials.push_back(static_cast<int32_t>(rng() % kRows));
        begin.push_back(static_cast<int32_t>(partials.size()));
      }
      if (!partials.empty()) partials.front() = 0;
      std::vector<float> want(rows * width);
      ASSERT_TRUE(reference.Combine(begin, partials, want.data()).ok());
      const DeviceBuffer sums = Poisoned(rows * width * 4, stream);
      ASSERT_TRUE(stream.Synchronize().ok());
      const absl::Status combined = (*combiner)->Combine(begin, partials, sums.as<float>());
      ASSERT_TRUE(combined.ok()) << combined;
      const auto got = ToHost<float>(sums, stream);
      ASSERT_EQ(std::memcmp(got.data(), want.data(), want.size() * 4), 0) << width << " x " << rows;
    }
    const std::vector<int32_t> too_many(132);
    EXPECT_TRUE(absl::IsInvalidArgument((*combiner)->Combine(too_many, {}, nullptr)));
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
  const std::vector<int32_t> begin = {0, 3, 3, 4}, partials = {2, 0, 3, 1};
  const DeviceBuffer rows = ToDevice(values, stream), sums = ToDevice(x, stream);
  const DeviceBuffer begins = ToDevice(begin, stream), numbers = ToDevice(partials, stream);
  ASSERT_TRUE(CombineRows({.base = rows.as<bf16>(),
                           .begin = begins.as<int32_t>(),
                           .partials = numbers.as<int32_t>(),
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
