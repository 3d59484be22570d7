// What the GPU tests share: buffers with random contents, parallel host loops, comparison.
#pragma once

#include <atomic>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda::testing_support {

inline std::vector<bf16> RandomBF16(std::mt19937& rng, int64_t count, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<bf16> values(count);
  for (bf16& v : values) v = F32ToBF16(normal(rng));
  return values;
}

template <class T>
DeviceBuffer ToDevice(const std::vector<T>& values, const Stream& stream) {
  auto buffer = DeviceBuffer::Allocate(std::ssize(values) * sizeof(T));
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  EXPECT_TRUE(buffer->Upload(values.data(), std::ssize(values) * sizeof(T), stream).ok());
  return *std::move(buffer);
}

// Every byte 0xff: NaN in bf16 and f32, so that what a kernel leaves unwritten shows.
inline DeviceBuffer Poisoned(int64_t bytes, const Stream& stream) {
  auto buffer = DeviceBuffer::Allocate(bytes);
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  EXPECT_TRUE(buffer->Fill(0xff, stream).ok());
  return *std::move(buffer);
}

template <class T>
std::vector<T> ToHost(const DeviceBuffer& buffer, const Stream& stream) {
  std::vector<T> values(buffer.bytes() / sizeof(T));
  EXPECT_TRUE(buffer.Download(values.data(), buffer.bytes(), stream).ok());
  const absl::Status done = stream.Synchronize();
  EXPECT_TRUE(done.ok()) << done;
  return values;
}

template <class F>
void ParallelFor(int64_t count, F body) {
  std::atomic<int64_t> next{0};
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (int64_t at; (at = next.fetch_add(1)) < count;) body(at);
    });
  }
}

// Rows of `width`: the whole's relative error, and the worst row's, so that one wrong row cannot hide.
inline void ExpectClose(const std::vector<bf16>& got, const std::vector<double>& want, int64_t width,
                        double whole, double row_limit, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double error = 0, norm = 0, worst = 0;
  int64_t worst_row = -1;
  for (int64_t row = 0; row * width < std::ssize(want); ++row) {
    double row_error = 0, row_norm = 0;
    for (int64_t i = row * width; i < (row + 1) * width; ++i) {
      const double difference = BF16ToF32(got[i]) - want[i];
      row_error += difference * difference;
      row_norm += want[i] * want[i];
    }
    error += row_error, norm += row_norm;
    const double relative = std::sqrt(row_error / row_norm);
    if (!(relative <= worst)) worst = relative, worst_row = row;  // NaN is the worst
    if (std::isnan(relative)) break;
  }
  EXPECT_LE(std::sqrt(error / norm), whole) << what;
  EXPECT_LE(worst, row_limit) << what << ", row " << worst_row << " of " << want.size() / width;
}

inline void ExpectSameBits(const std::vector<bf16>& got, const std::vector<bf16>& want, int64_t width,
                           const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  std::string rows;
  int64_t differing = 0;
  for (int64_t row = 0; row * width < std::ssize(want); ++row) {
    int64_t first = -1, last = 0;
    for (int64_t i = 0; i < width; ++i) {
      if (got[row * width + i] == want[row * width + i]) continue;
      if (first < 0) first = i;
      last = i;
    }
    if (first >= 0 && ++differing <= 8) {
      rows +=
          " row " + std::to_string(row) + " columns " + std::to_string(first) + ".." + std::to_string(last);
    }
  }
  EXPECT_EQ(differing, 0) << what << ":" << rows;
}

}  // namespace minke::cuda::testing_support
