// One line of `minke bench kernels`: a kernel at one shape, with what it cannot do without.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libs/base/dtype.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/bench/ceilings.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/model/config.h"

namespace minke::kernels::bench {

// Inputs of the cases. Making them takes longer than measuring, so cases of one shape that follow each other
// share: each slot keeps what was made last.
class Workspace {
 public:
  explicit Workspace(ThreadPool& pool) : pool_(pool) {}
  ThreadPool& pool() { return pool_; }

  template <typename Make>
  auto Keep(const std::string& slot, const std::string& key, Make make) {
    using T = decltype(make());
    Slot& kept = slots_[slot];
    if (kept.key != key) {
      kept.value.reset();  // first, for its memory
      kept.value = std::make_shared<T>(make());
      kept.key = key;
    }
    return std::static_pointer_cast<T>(kept.value);
  }

 private:
  struct Slot {
    std::string key;
    std::shared_ptr<void> value;
  };
  ThreadPool& pool_;
  std::map<std::string, Slot> slots_;
};

struct KernelCase {
  std::string name;
  Precision precision = Precision::kBF16;  // decides which ceiling of FLOP/s holds
  // Of one call. `bytes`: what has to come from memory, that is weights and cached latents; activations were
  // made a moment ago and are in a cache, except where they are all there is (norm, rope).
  double bytes = 0;
  double flops = 0;
  // Makes the inputs; the function it returns is one call, and goes on to other weights each time.
  std::function<std::function<void()>(Workspace& workspace)> prepare;
};

std::vector<KernelCase> CeilingCases(const CeilingLoops& loops, const Ceilings& ceilings, ThreadPool& pool);
std::vector<KernelCase> MatMulCases();
std::vector<KernelCase> FfnCases();
std::vector<KernelCase> MlaCases();
std::vector<KernelCase> RowCases();  // what works row by row: norm, rope, gate

// How many sets of `bytes` it takes to rotate through kRotateBytes.
int64_t RotatingSets(int64_t bytes);
// Weights that cost nothing to make: element (begin + i) of a tensor, in [-0.5, 0.5).
void PatternWeights(int64_t begin, std::span<float> out);
// Normally distributed activations, in f32 and as bytes of the activation dtype.
std::vector<float> RandomFloats(int64_t n);
std::vector<std::byte> RandomActivations(Precision precision, int64_t n);
// The parts of DeepSeek-V2's configuration that kernels look at.
ModelConfig DeepSeekV2Config(int32_t heads);

}  // namespace minke::kernels::bench
