#include "libs/kernels/bench/kernels_bench.h"

#include <benchmark/benchmark.h>

#include <iterator>
#include <regex>

#include "libs/base/status.h"
#include "libs/kernels/bench/kernel_case.h"
#include "libs/kernels/bench/reporter.h"

namespace minke::kernels::bench {
namespace {

absl::StatusOr<std::regex> ParseFilter(const std::string& filter) {
  try {
    return std::regex(filter, std::regex::extended | std::regex::optimize);
  } catch (const std::regex_error&) {
    return absl::InvalidArgumentError(
        StrCat("--filter: expected an extended regular expression, found ", filter));
  }
}

std::vector<KernelCase> AllCases(const CeilingLoops& loops, const Ceilings& ceilings, ThreadPool& pool) {
  std::vector<KernelCase> all = CeilingCases(loops, ceilings, pool);
  for (std::vector<KernelCase> (*part)() : {MatMulCases, FfnCases, MlaCases, RowCases}) {
    std::vector<KernelCase> cases = part();
    std::move(cases.begin(), cases.end(), std::back_inserter(all));
  }
  return all;
}

// A kernel's inputs are made once, although Google Benchmark calls it again and again until it has run for
// long enough, and go before those of the next one come.
class Runner {
 public:
  Runner(ThreadPool& pool, const CeilingMeter& meter, Reporter& reporter)
      : workspace_(pool), meter_(meter), reporter_(reporter) {}
  void Run(const KernelCase& kernel, benchmark::State& state) {
    if (current_ != &kernel) {
      call_ = nullptr;
      call_ = kernel.prepare(workspace_);
      current_ = &kernel;
      call_();
    }
    const CeilingsBeside before = meter_.Now(kernel.precision);
    for (auto _ : state) call_();
    const CeilingsBeside after = meter_.Now(kernel.precision);
    reporter_.SetBeside({(before.read_bytes_per_s + after.read_bytes_per_s) / 2,
                         (before.flops_per_s + after.flops_per_s) / 2});
  }

 private:
  Workspace workspace_;
  const CeilingMeter& meter_;
  Reporter& reporter_;
  const KernelCase* current_ = nullptr;
  std::function<void()> call_;
};

}  // namespace

absl::Status RunKernelsBench(const KernelsBenchOptions& options, std::ostream& table, std::ostream* json) {
  MK_CHECK(&Tiles() == &TileKernelsFor(options.isa));
  MK_ASSIGN_OR_RETURN(const std::regex filter, ParseFilter(options.filter));
  const CeilingLoops& loops = CeilingLoopsFor(options.isa);
  ThreadPool pool(options.threads);
  // Names do not depend on ceilings: a filter that fits nothing is found before anything is measured.
  const auto matching = [&](const Ceilings& ceilings) {
    std::vector<KernelCase> cases = AllCases(loops, ceilings, pool);
    std::erase_if(cases, [&](const KernelCase& kernel) { return !std::regex_search(kernel.name, filter); });
    return cases;
  };
  const Ceilings names_only{.bf16_dot = loops.bf16_dot.run != nullptr};
  if (matching(names_only).empty())
    return absl::InvalidArgumentError(StrCat("--filter: no kernel matches ", options.filter));

  const CeilingMeter meter(options.isa, pool);
  const std::vector<KernelCase> cases = matching(meter.ceilings());

  // The time is a flag: as a setting of a benchmark it would become part of its name.
  std::string program = "minke", min_time = StrCat("--benchmark_min_time=", options.min_seconds);
  char* arguments[] = {program.data(), min_time.data(), nullptr};
  int count = 2;
  benchmark::Initialize(&count, arguments);
  benchmark::ClearRegisteredBenchmarks();
  Reporter reporter(meter.ceilings(), cases, table);
  Runner runner(pool, meter, reporter);
  for (const KernelCase& kernel : cases) {
    benchmark::RegisterBenchmark(kernel.name.c_str(),
                                 [&](benchmark::State& state) { runner.Run(kernel, state); })
        ->Unit(benchmark::kMicrosecond)
        ->UseRealTime();
  }
  benchmark::RunSpecifiedBenchmarks(&reporter, "all");
  benchmark::ClearRegisteredBenchmarks();
  if (json != nullptr) *json << reporter.Json(Tiles().name, options.threads) << std::flush;
  return absl::OkStatus();
}

}  // namespace minke::kernels::bench
