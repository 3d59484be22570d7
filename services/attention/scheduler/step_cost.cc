#include "services/attention/scheduler/step_cost.h"

#include <algorithm>
#include <bit>

namespace minke::attention {
namespace {

constexpr double kNews = 0.2;             // weight of the newest step
constexpr int64_t kAloneAfterSteps = 64;  // one step in so many tells what decoding alone takes

void Learn(double& value, double news) { value = value == 0 ? news : value + kNews * (news - value); }

size_t Bucket(int64_t rows) { return std::bit_width(static_cast<uint32_t>(rows)) - 1; }

}  // namespace

void StepCost::Took(double seconds, int64_t decode_rows, int64_t prompt_rows) {
  if (decode_rows > 0) {
    Decode& decode = decode_[Bucket(decode_rows)];
    if (prompt_rows == 0) {
      Learn(decode.seconds, seconds);
      decode.steps_with_prompts = 0;
      return;
    }
    ++decode.steps_with_prompts;
    // Decoding of a number of rows never seen alone: what the prompts added is not known either.
    if (decode.seconds == 0) return;
    seconds -= decode.seconds;
  }
  if (prompt_rows > 0) Learn(prompt_row_seconds_, std::max(seconds, 1e-7) / static_cast<double>(prompt_rows));
}

std::optional<double> StepCost::DecodeSeconds(int64_t decode_rows) const {
  const Decode& decode = decode_[Bucket(decode_rows)];
  if (decode.seconds == 0 || decode.steps_with_prompts >= kAloneAfterSteps) return std::nullopt;
  return decode.seconds;
}

std::optional<double> StepCost::PromptRowSeconds() const {
  return prompt_row_seconds_ == 0 ? std::nullopt : std::optional(prompt_row_seconds_);
}

}  // namespace minke::attention
