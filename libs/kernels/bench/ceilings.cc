#include "libs/kernels/bench/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "absl/functional/function_ref.h"
#include "libs/base/status.h"

namespace minke::kernels::bench {

extern const CeilingLoops k_ceiling_loops_portable, k_ceiling_loops_avx2, k_ceiling_loops_avx512,
    k_ceiling_loops_avx512bf16, k_ceiling_loops_amx;

const CeilingLoops& CeilingLoopsFor(Isa isa) {
  MK_CHECK(IsaSupported(isa));
  switch (isa) {
    case Isa::kPortable:
      return k_ceiling_loops_portable;
    case Isa::kAvx2:
      return k_ceiling_loops_avx2;
    case Isa::kAvx512:
      return k_ceiling_loops_avx512;
    case Isa::kAvx512Bf16:
      return k_ceiling_loops_avx512bf16;
    case Isa::kAmx:
      return k_ceiling_loops_amx;
  }
  return k_ceiling_loops_portable;
}

namespace {

constexpr int kRepetitions = 7;
constexpr int64_t kPieceBytes = 4 << 20;
constexpr int64_t kRounds = 1 << 19;  // about 2 ms
constexpr int64_t kTasksPerThread = 8;

double Seconds(absl::FunctionRef<void()> body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double MedianSeconds(absl::FunctionRef<void()> body) {
  body();  // wakes the threads, warms the frequency
  double seconds[kRepetitions];
  for (double& s : seconds) s = Seconds(body);
  std::nth_element(seconds, seconds + kRepetitions / 2, seconds + kRepetitions);
  return seconds[kRepetitions / 2];
}

}  // namespace

HugeBuffer MakeReadBuffer(ThreadPool& pool) {
  HugeBuffer buffer(kRotateBytes);
  pool.ParallelFor(kRotateBytes / kPieceBytes, [&](int64_t piece) {
    std::memset(buffer.data() + piece * kPieceBytes, static_cast<int>(piece % 127) + 1, kPieceBytes);
  });
  return buffer;
}

void ReadOnce(const CeilingLoops& loops, int pattern, const HugeBuffer& buffer, ThreadPool& pool) {
  std::atomic<uint64_t> sum{0};
  pool.ParallelFor(buffer.bytes() / kPieceBytes, [&](int64_t piece) {
    sum.fetch_xor(loops.read[pattern](buffer.data() + piece * kPieceBytes, kPieceBytes),
                  std::memory_order_relaxed);
  });
}

double FlopsOfOneRun(const CeilingLoops::Flops& loop, const ThreadPool& pool) {
  return static_cast<double>(pool.threads() * kTasksPerThread * kRounds) * loop.flops_per_round;
}

void RunFlopsOnce(const CeilingLoops::Flops& loop, ThreadPool& pool) {
  std::atomic<float> result{0};
  pool.ParallelFor(pool.threads() * kTasksPerThread, [&](int64_t task) {
    // x below 1: the chains stay finite and normal.
    result.store(loop.run(kRounds, 0.5f, 1.0f + static_cast<float>(task)), std::memory_order_relaxed);
  });
}

CeilingMeter::CeilingMeter(Isa isa, ThreadPool& pool)
    : loops_(CeilingLoopsFor(isa)), pool_(pool), buffer_(MakeReadBuffer(pool)) {
  for (int pattern = 0; pattern < CeilingLoops::kReadPatterns; ++pattern) {
    const double seconds = MedianSeconds([&] { ReadOnce(loops_, pattern, buffer_, pool); });
    ceilings_.reads.push_back({kReadPatternNames[pattern], static_cast<double>(buffer_.bytes()) / seconds});
    if (ceilings_.reads.back().bytes_per_s > ceilings_.read_bytes_per_s) {
      ceilings_.read_bytes_per_s = ceilings_.reads.back().bytes_per_s;
      ceilings_.best_read = pattern;
    }
  }
  const auto flops_per_s = [&](const CeilingLoops::Flops& loop) {
    return FlopsOfOneRun(loop, pool) / MedianSeconds([&] { RunFlopsOnce(loop, pool); });
  };
  ceilings_.f32_flops_per_s = flops_per_s(loops_.f32);
  ceilings_.bf16_dot = loops_.bf16_dot.run != nullptr;
  ceilings_.bf16_flops_per_s = ceilings_.bf16_dot ? flops_per_s(loops_.bf16_dot) : ceilings_.f32_flops_per_s;
}

CeilingsBeside CeilingMeter::Now(Precision precision) const {
  constexpr int kPasses = 2;
  const CeilingLoops::Flops& loop =
      precision == Precision::kBF16 && ceilings_.bf16_dot ? loops_.bf16_dot : loops_.f32;
  const double read_s = Seconds([&] {
    for (int i = 0; i < kPasses; ++i) ReadOnce(loops_, ceilings_.best_read, buffer_, pool_);
  });
  const double flops_s = Seconds([&] { RunFlopsOnce(loop, pool_); });
  return {static_cast<double>(kPasses * buffer_.bytes()) / read_s, FlopsOfOneRun(loop, pool_) / flops_s};
}

}  // namespace minke::kernels::bench
