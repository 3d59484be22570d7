// The machine's ceilings, measured in the run whose kernels are compared with them: shared machines are as
// fast as their neighbours let them be.
#pragma once

#include <string>
#include <vector>

#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/bench/ceiling_loops.h"
#include "libs/kernels/cpu/packed_matrix.h"

namespace minke::kernels::bench {

// More than any cache, so that what rotates through it comes from memory.
inline constexpr int64_t kRotateBytes = int64_t{512} << 20;

struct Ceilings {
  struct ReadPattern {
    std::string name;
    double bytes_per_s;  // median of the repetitions
  };
  std::vector<ReadPattern> reads;
  int best_read = 0;  // index of the fastest

  double read_bytes_per_s = 0;  // of best_read
  double f32_flops_per_s = 0;
  double bf16_flops_per_s = 0;  // f32_flops_per_s where bf16_dot is false: bf16 is widened there
  bool bf16_dot = false;        // the instruction set multiplies bf16 itself
};

// What held while a kernel was measured.
struct CeilingsBeside {
  double read_bytes_per_s = 0;
  double flops_per_s = 0;  // in the operands that the kernel multiplies
};

// Measures at once, and again, in less time, whenever it is asked: what the neighbours leave of a shared
// machine's bandwidth changes within seconds. Thread-compatible.
class CeilingMeter {
 public:
  CeilingMeter(Isa isa, ThreadPool& pool);
  const Ceilings& ceilings() const { return ceilings_; }
  CeilingsBeside Now(Precision precision) const;

 private:
  const CeilingLoops& loops_;
  ThreadPool& pool_;
  HugeBuffer buffer_;
  Ceilings ceilings_;
};

// kRotateBytes that have been written to.
HugeBuffer MakeReadBuffer(ThreadPool& pool);
// One pass over a buffer, or some thousand rounds of multiply-adds, on all threads of the pool.
void ReadOnce(const CeilingLoops& loops, int pattern, const HugeBuffer& buffer, ThreadPool& pool);
void RunFlopsOnce(const CeilingLoops::Flops& loop, ThreadPool& pool);
double FlopsOfOneRun(const CeilingLoops::Flops& loop, const ThreadPool& pool);

}  // namespace minke::kernels::bench
