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

// The kernels choose once, by the environment.
absl::StatusOr<Isa> ChooseIsa(const std::string& name) {
  for (const Isa isa : kernels::kIsas) {
    if (name != kernels::IsaName(isa)) continue;
    if (!kernels::IsaSupported(isa))
      return absl::FailedPreconditionError(StrCat("--isa: this CPU has no ", name));
    ::setenv("MINKE_ISA", name.c_str(), 1);
  }
  for (const Isa isa : kernels::kIsas) {
    if (kernels::IsaSupported(isa) && &kernels::Tiles() == &kernels::TileKernelsFor(isa)) return isa;
  }
  return absl::InternalError("kernels of an unknown instruction set");
}

std::vector<std::string> IsaNames() {
  std::vector<std::string> names;
  for (const Isa isa : kernels::kIsas) names.emplace_back(kernels::IsaName(isa));
  return names;
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
      ->check(CLI::IsMember(IsaNames()));
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
