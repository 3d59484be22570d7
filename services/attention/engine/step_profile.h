// Where the engine thread's time goes. At any moment it is in one phase; entering the next ends the last.
// Sums are always kept (two clock reads per change, some 50 ns); with a trace file every stay is kept too and
// written in Chrome's trace format (ui.perfetto.dev opens it) once enough steps have passed.
//
// Engine thread only, but for seconds(), which is read by others through Engine's status.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "services/attention/engine/phase_times.h"

namespace minke::attention {

class StepProfile {
 public:
  // trace_file: empty for none.
  StepProfile(std::string trace_file, int64_t trace_steps);
  ~StepProfile();  // writes what there is of a trace
  StepProfile(const StepProfile&) = delete;
  StepProfile& operator=(const StepProfile&) = delete;

  // `layer`: -1 where it has none.
  void Enter(StepPhase phase, int layer = -1);
  void StepBegins(int64_t rows);
  const std::array<double, kStepPhases>& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Stay {
    StepPhase phase;
    int16_t layer;
    int32_t rows;
    Clock::time_point begin, end;
  };
  void WriteTrace();

  const std::string trace_file_;
  int64_t trace_steps_;
  const Clock::time_point start_ = Clock::now();
  StepPhase phase_ = StepPhase::kIdle;
  int layer_ = -1;
  int64_t rows_ = 0;
  Clock::time_point since_ = start_;
  std::array<double, kStepPhases> seconds_{};
  std::vector<Stay> stays_;
};

}  // namespace minke::attention
