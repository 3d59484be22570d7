// CPU kernels beside the machine's read bandwidth, measured in the same run. Buffers rotate, so weights come
// from memory.
#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <thread>

#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/packed_matrix.h"

namespace minke::kernels {
namespace {

constexpr int64_t kRotateBytes = int64_t{512} << 20;

ThreadPool& Pool() {
  static ThreadPool pool(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  return pool;
}

void ReadBandwidth(benchmark::State& state) {
  HugeBuffer buffer(kRotateBytes);
  std::memset(buffer.data(), 1, kRotateBytes);
  constexpr int64_t kPiece = 4 << 20;
  for (auto _ : state) {
    Pool().ParallelFor(kRotateBytes / kPiece, [&](int64_t piece) {
      const auto* p = reinterpret_cast<const uint64_t*>(buffer.data() + piece * kPiece);
      uint64_t sum = 0;
      for (int64_t i = 0; i < kPiece / 8; ++i) sum ^= p[i];
      benchmark::DoNotOptimize(sum);
    });
  }
  state.SetBytesProcessed(state.iterations() * kRotateBytes);
}
BENCHMARK(ReadBandwidth)->Unit(benchmark::kMillisecond)->UseRealTime();

// rows, k, n
void MatMulBf16(benchmark::State& state) {
  const int64_t rows = state.range(0), k = state.range(1), n = state.range(2);
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::vector<PackedMatrix> weights;
  do {
    weights.push_back(PackedMatrix::Pack(
        Precision::kBF16, n, k,
        [&](int64_t row, std::span<float> out) {
          for (size_t i = 0; i < out.size(); ++i)
            out[i] = static_cast<float>((row * 31 + static_cast<int64_t>(i) * 17) % 64 - 32) / 64;
        },
        Pool()));
  } while (weights.size() * weights.front().bytes() < kRotateBytes);
  std::vector<bf16> x(rows * k);
  for (bf16& v : x) v = F32ToBF16(normal(rng));
  std::vector<float> y(rows * n);
  size_t next = 0;
  for (auto _ : state) {
    MatMul(weights[next++ % weights.size()], reinterpret_cast<const std::byte*>(x.data()), k, rows, y.data(),
           n, Pool());
    benchmark::DoNotOptimize(y.data());
  }
  state.SetBytesProcessed(state.iterations() * n * k * 2);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2.0 * rows * n * k * state.iterations() / 1e9, benchmark::Counter::kIsRate);
}
BENCHMARK(MatMulBf16)
    ->ArgsProduct({{1, 4, 16, 64, 256}, {5120}, {1536}})
    ->ArgsProduct({{1, 4, 16, 64, 256}, {1024}, {384}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace minke::kernels

BENCHMARK_MAIN();
