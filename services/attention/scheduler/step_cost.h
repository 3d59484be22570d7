// What steps take on this machine, learned from those that were run: of decoding rows alone, by their number
// (powers of two), and of each prompt row that rides along. Thread-compatible.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace minke::attention {

class StepCost {
 public:
  void Took(double seconds, int64_t decode_rows, int64_t prompt_rows);
  // Of a step with so many decoding rows and no prompt rows. Nothing: not known, or for too long only seen
  // with prompt rows beside them (what decoding takes changes with its depth); run one without.
  std::optional<double> DecodeSeconds(int64_t decode_rows) const;
  // What a prompt row adds; nothing: not known.
  std::optional<double> PromptRowSeconds() const;

 private:
  struct Decode {
    double seconds = 0;              // 0: never seen
    int64_t steps_with_prompts = 0;  // since it was last seen alone
  };
  std::array<Decode, 32> decode_;  // by bit width of the number of rows
  double prompt_row_seconds_ = 0;
};

}  // namespace minke::attention
