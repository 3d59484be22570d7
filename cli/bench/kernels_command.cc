#include "cli/bench/kernels_command.h"

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <sstream>
#include <thread>

#include "absl/strings/str_format.h"
#include "cli/bench/json_output.h"
#include "libs/base/status.h"
#include "libs/kernels/bench/kernels_bench.h"

namespace minke::cli::bench {
namespace {

using kernels::Isa;

constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

// The kernels choose once, by the environment.
absl::StatusOr<Isa> ChooseIsa(const std::string& name) {
  for (size_t i = 0; i < std::size(kIsas); ++i) {
    if (name != kIsaNames[i]) continue;
    if (!kernels::IsaSupported(kIsas[i]))
      return absl::FailedPreconditionError(StrCat("--isa: this CPU has no ", name));
    ::setenv("MINKE_ISA", kIsaNames[i], 1);
  }
  for (size_t i = 0; i < std::size(kIsas); ++i) {
    if (kernels::Tiles().name == std::string(kIsaNames[i])) return kIsas[i];
  }
  return absl::InternalError("kernels of an unknown instruction set");
}

}  // namespace

void AddKernelsFlags(CLI::App& app, KernelsFlags& flags) {
  app.add_option("--filter", flags.filter, "extended regular expression, searched for in the names");
  app.add_option("--min-time", flags.min_time_s, "seconds for each kernel, at least")
      ->check(CLI::Range(0.001, 600.0))
      ->capture_default_str();
  app.add_option("--threads", flags.threads, "compute threads; 0: all cores")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--isa", flags.isa, "kernels to measure (default: the best this CPU has)")
      ->check(CLI::IsMember({"portable", "avx2", "avx512", "avx512bf16"}));
  app.add_option("--json", flags.json,
                 "write the result there too; -: to standard output, the table to stderr");
}

absl::Status RunKernels(const KernelsFlags& flags, std::ostream& out) {
  MK_RETURN_IF_ERROR(CheckWritable(flags.json));
  kernels::bench::KernelsBenchOptions options{.filter = flags.filter, .min_seconds = flags.min_time_s};
  MK_ASSIGN_OR_RETURN(options.isa, ChooseIsa(flags.isa));
  options.threads =
      flags.threads > 0 ? flags.threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::ostringstream json;
  MK_RETURN_IF_ERROR(RunKernelsBench(options, TableStream(flags.json, out), &json));
  return WriteJson(flags.json, json.str(), out);
}

}  // namespace minke::cli::bench
