// What a processor reaches, for the planner: built in for some GPUs, or read from what the benchmarks of this
// repository print (docs/planner.md, "Ceilings").
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace minke::cli {

struct Ceilings {
  std::string name;
  std::string source;  // measured, derived, or the file

  // FLOP/s of: dense bf16 products; MLA decode (absorbed); attention of prompts (naive); grouped experts.
  double product_flops = 0, decode_flops = 0, prefill_flops = 0, expert_flops = 0, expert_fp8_flops = 0;
  // Bytes/s of reading: anything; experts' weights.
  double read_bytes_per_s = 0, expert_bytes_per_s = 0, expert_fp8_bytes_per_s = 0;
  double memory_bytes = 0;

  // How reading and multiplying add up: (read^n + multiply^n)^(1/n). 1: one after the other; large: the
  // longer of the two.
  double overlap = 1;

  // An attention node: fixed time of a layer (launches), and what taking rows to the data plane and sums back
  // costs its host thread, fixed and by bytes. bytes/s 0: costs nothing.
  double layer_s = 0, crossing_s = 0, crossing_bytes_per_s = 0;
  // An expert server: the same of a launch.
  double launch_s = 0, launch_bytes_per_s = 0;

  // Seconds for `bytes` of weights and `flops` with them.
  double Roof(double bytes, double bytes_per_s, double flops, double flops_per_s) const;
};

// Names of the built-in ones.
std::vector<std::string> GpuNames();
// INVALID_ARGUMENT naming those there are.
absl::StatusOr<Ceilings> BuiltInCeilings(std::string_view gpu);

// `base` with what a JSON file says put over it: one of this planner's own, `minke bench kernels --json`,
// `bench/gpu/run --json` or `bench/cpu_table --json`. INVALID_ARGUMENT naming what was expected and found.
absl::StatusOr<Ceilings> ParseCeilings(std::string_view json, Ceilings base);
// Reads the file; errors name it.
absl::StatusOr<Ceilings> LoadCeilings(const std::string& path, const Ceilings& base);

// Rows stay in GPU memory (docs/gpu.md): crossings without copies.
Ceilings WithRowsInGpuMemory(Ceilings ceilings);
// As if they took no time at all: no crossings, no fixed times.
Ceilings WithoutCrossings(Ceilings ceilings);

// INVALID_ARGUMENT naming the first rate that a role needs and is missing.
absl::Status CheckComplete(const Ceilings& ceilings);

}  // namespace minke::cli
