#include "services/attention/engine/step_profile.h"

#include <cstdio>
#include <fstream>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::attention {

std::string_view ToString(StepPhase phase) {
  constexpr std::string_view kNames[kStepPhases] = {"idle",           "plan",  "attention", "dispatch",
                                                    "shared_experts", "wait",  "combine",   "head",
                                                    "sampling",       "output"};
  return kNames[static_cast<int>(phase)];
}

StepProfile::StepProfile(std::string trace_file, int64_t trace_steps)
    : trace_file_(std::move(trace_file)), trace_steps_(trace_file_.empty() ? 0 : trace_steps) {}

StepProfile::~StepProfile() {
  if (trace_steps_ > 0) WriteTrace();
}

void StepProfile::Enter(StepPhase phase, int layer) {
  const Clock::time_point now = Clock::now();
  seconds_[static_cast<int>(phase_)] += std::chrono::duration<double>(now - since_).count();
  if (trace_steps_ > 0 && rows_ > 0) {
    stays_.push_back({phase_, static_cast<int16_t>(layer_), static_cast<int32_t>(rows_), since_, now});
  }
  phase_ = phase;
  layer_ = layer;
  since_ = now;
}

void StepProfile::StepBegins(int64_t rows) {
  if (trace_steps_ > 0 && rows_ > 0 && --trace_steps_ == 0) WriteTrace();
  rows_ = rows;
}

void StepProfile::WriteTrace() {
  std::ofstream out(trace_file_);
  out << "{\"traceEvents\":[";
  const auto microseconds = [&](Clock::time_point t) {
    return std::chrono::duration<double, std::micro>(t - start_).count();
  };
  char line[256];
  for (size_t i = 0; i < stays_.size(); ++i) {
    const Stay& stay = stays_[i];
    std::snprintf(line, sizeof line,
                  "%s\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"dur\":%.3f,"
                  "\"args\":{\"layer\":%d,\"rows\":%d}}",
                  i == 0 ? "" : ",", std::string(ToString(stay.phase)).c_str(), microseconds(stay.begin),
                  microseconds(stay.end) - microseconds(stay.begin), stay.layer, stay.rows);
    out << line;
  }
  out << "\n]}\n";
  out.flush();
  if (out.good()) {
    log::Info("attention", StrCat("step trace written file=", trace_file_, " events=", stays_.size()));
  } else {
    log::Error("attention", StrCat("cannot write the step trace to ", trace_file_));
  }
  stays_.clear();
  trace_steps_ = 0;
}

}  // namespace minke::attention
