#include "libs/kernels/bench/reporter.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::kernels::bench {
namespace {

constexpr const char* kShare = "share";
constexpr const char* kGflops = "GFLOP/s";
constexpr const char* kBytesPerSecond = "bytes_per_second";
constexpr const char* kCeilingBytes = "ceiling_bytes_per_second";
constexpr const char* kCeilingGflops = "ceiling_GFLOP/s";
constexpr const char* kMemory = "memory";
constexpr const char* kCompute = "compute";

double Seconds(const benchmark::BenchmarkReporter::Run& run) {
  return run.real_accumulated_time / static_cast<double>(std::max<int64_t>(1, run.iterations));
}

std::string ShowTime(double seconds) {
  if (seconds < 1e-3) return absl::StrFormat("%.1f us", seconds * 1e6);
  return seconds < 1 ? absl::StrFormat("%.2f ms", seconds * 1e3) : absl::StrFormat("%.2f s", seconds);
}

std::string ShowGiga(double value) {
  return absl::StrFormat(value < 1e10 ? "%.2f" : value < 1e11 ? "%.1f" : "%.0f", value / 1e9);
}

std::string ShowCeilings(const Ceilings& ceilings) {
  std::string text = absl::StrFormat("%-18s%s GB/s (", "read bandwidth", ShowGiga(ceilings.read_bytes_per_s));
  for (const Ceilings::ReadPattern& read : ceilings.reads)
    StrAppend(&text, &read == &ceilings.reads[0] ? "" : ", ", read.name, " ", ShowGiga(read.bytes_per_s));
  absl::StrAppendFormat(&text, ")\n%-18s%s GFLOP/s\n%-18s%s GFLOP/s%s\n", "f32 products",
                        ShowGiga(ceilings.f32_flops_per_s), "bf16 products",
                        ShowGiga(ceilings.bf16_flops_per_s), ceilings.bf16_dot ? "" : " (widened to f32)");
  return text;
}

}  // namespace

Reporter::Reporter(const Ceilings& ceilings, const std::vector<KernelCase>& cases, std::ostream& table)
    : ceilings_(ceilings), table_(table) {
  for (const KernelCase& kernel : cases) {
    cases_[kernel.name] = &kernel;
    name_width_ = std::max(name_width_, kernel.name.size());
  }
  json_.SetOutputStream(&json_text_);
}

bool Reporter::ReportContext(const Context& context) {
  table_ << ShowCeilings(ceilings_) << "\n"
         << absl::StrFormat("%-*s %10s %8s %9s %8s  %s\n", static_cast<int>(name_width_), "kernel", "time",
                            "GB/s", "GFLOP/s", "share", "of")
         << std::flush;
  return json_.ReportContext(context);
}

void Reporter::ReportRuns(const std::vector<Run>& runs) {
  std::vector<Run> compared;
  for (const Run& run : runs) compared.push_back(Compared(run));
  for (const Run& run : compared) PrintRow(run);
  json_.ReportRuns(compared);
}

void Reporter::Finalize() { json_.Finalize(); }

Reporter::Run Reporter::Compared(const Run& run) const {
  const KernelCase& kernel = *cases_.at(run.run_name.function_name);
  const double seconds = Seconds(run);
  const double memory = kernel.bytes / beside_.read_bytes_per_s, compute = kernel.flops / beside_.flops_per_s;
  Run compared = run;
  compared.report_label = memory > compute ? kMemory : kCompute;
  compared.counters["bytes"] = kernel.bytes;
  compared.counters["flops"] = kernel.flops;
  compared.counters[kBytesPerSecond] = kernel.bytes / seconds;
  compared.counters[kGflops] = kernel.flops / seconds / 1e9;
  compared.counters[kCeilingBytes] = beside_.read_bytes_per_s;
  compared.counters[kCeilingGflops] = beside_.flops_per_s / 1e9;
  compared.counters[kShare] = std::max(memory, compute) / seconds;
  return compared;
}

void Reporter::PrintRow(const Run& run) {
  const auto& counters = run.counters;
  const auto rate = [](double per_second) {
    return per_second > 0 ? ShowGiga(per_second) : std::string("-");
  };
  const std::string limit =
      run.report_label == kMemory
          ? StrCat("memory, ", ShowGiga(counters.at(kCeilingBytes)), " GB/s")
          : StrCat("compute, ", ShowGiga(counters.at(kCeilingGflops) * 1e9), " GFLOP/s");
  table_ << absl::StrFormat("%-*s %10s %8s %9s %6.0f %%  %s\n", static_cast<int>(name_width_),
                            run.run_name.function_name, ShowTime(Seconds(run)),
                            rate(counters.at(kBytesPerSecond)), rate(counters.at(kGflops) * 1e9),
                            100 * counters.at(kShare), limit)
         << std::flush;
}

std::string Reporter::Json(const std::string& isa, int threads) const {
  auto json = nlohmann::ordered_json::parse(json_text_.str());
  nlohmann::ordered_json reads = nlohmann::ordered_json::object();
  for (const Ceilings::ReadPattern& read : ceilings_.reads) reads[read.name] = read.bytes_per_s;
  json["context"]["isa"] = isa;
  json["context"]["threads"] = threads;
  json["context"]["ceilings"] = {{"read_bytes_per_second", ceilings_.read_bytes_per_s},
                                 {"read_patterns_bytes_per_second", reads},
                                 {"f32_flops_per_second", ceilings_.f32_flops_per_s},
                                 {"bf16_flops_per_second", ceilings_.bf16_flops_per_s},
                                 {"bf16_dot", ceilings_.bf16_dot}};
  return json.dump(2) + "\n";
}

}  // namespace minke::kernels::bench
