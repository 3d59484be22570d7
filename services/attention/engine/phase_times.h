// The phases of an engine's step, and time by phase.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace minke::attention {

enum class StepPhase : uint8_t {
  kIdle,           // no sequence to compute
  kPlan,           // mail, scheduling, laying out the batch
  kAttention,      // norms, projections, attention over the cache, and the dense layers' feed-forward
  kDispatch,       // sending rows to be routed
  kSharedExperts,  // while routed rows are away
  kWait,           // nothing left to do here: experts, router or network
  kCombine,        // adding up the partial sums
  kHead,           // logits
  kSampling,
  kOutput,  // events, publishing pages
};
inline constexpr int kStepPhases = 10;
std::string_view ToString(StepPhase phase);

// Of the steps that had rows of one request: all of each step's time, whatever others were in it.
struct PhaseTimes {
  uint32_t steps = 0;
  std::array<double, kStepPhases> seconds{};

  void Add(const std::array<double, kStepPhases>& step) {
    ++steps;
    for (int i = 0; i < kStepPhases; ++i) seconds[i] += step[i];
  }
};

}  // namespace minke::attention
