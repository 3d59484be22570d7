// What Google Benchmark measured, against the ceilings: a table as it goes, JSON at the end.
#pragma once

#include <benchmark/benchmark.h>

#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "libs/kernels/bench/kernel_case.h"

namespace minke::kernels::bench {

class Reporter : public benchmark::BenchmarkReporter {
 public:
  // Keeps references to all three.
  Reporter(const Ceilings& ceilings, const std::vector<KernelCase>& cases, std::ostream& table);

  // Of the kernel whose runs are reported next.
  void SetBeside(const CeilingsBeside& beside) { beside_ = beside; }

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  // After Finalize. Google Benchmark's JSON, whose context also has `isa`, `threads` and the ceilings.
  std::string Json(const std::string& isa, int threads) const;

 private:
  // Adds counters (what was reached, what could have been, the share) and the label (what limits) to a run.
  Run Compared(const Run& run) const;
  void PrintRow(const Run& run);

  const Ceilings& ceilings_;
  CeilingsBeside beside_;
  std::map<std::string, const KernelCase*> cases_;
  std::ostream& table_;
  size_t name_width_ = 0;
  std::ostringstream json_text_;
  benchmark::JSONReporter json_;
};

}  // namespace minke::kernels::bench
