#include "cli/plan/ceilings.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>

#include "libs/base/json_depth.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke::cli {
namespace {

using Json = nlohmann::json;

constexpr double kTera = 1e12, kGiga = 1e9;

// Measured with this repository's kernels (docs/gpu.md, docs/gpu_experts.md, docs/gpu_model.md). Crossings:
// what a layer of V2's attention node takes longer in segments than in one graph at B = 1, 16, 128 is 31, 49,
// 394 us, at 10,240 bytes of rows down and 20,480 of sums up a row: 24 us and 10.6 GB/s. Fixed: 160 us of a
// layer at B = 1 less its weights. Launches of an expert server: what 48, 384, 1,837 rows take longer from
// host memory to host memory than their kernels.
Ceilings H200() {
  return {.name = "h200",
          .source = "measured on an H200 (docs/gpu.md)",
          .product_flops = 790 * kTera,
          .decode_flops = 560 * kTera,
          .prefill_flops = 600 * kTera,
          .expert_flops = 622 * kTera,
          .expert_fp8_flops = 503 * kTera,
          .read_bytes_per_s = 4273 * kGiga,
          .expert_bytes_per_s = 4273 * kGiga,
          .expert_fp8_bytes_per_s = 4000 * kGiga,
          .memory_bytes = 149 * kGiga,
          .overlap = 2,
          .layer_s = 68e-6,
          .crossing_s = 24e-6,
          .crossing_bytes_per_s = 10.6 * kGiga,
          .launch_s = 90e-6,
          .launch_bytes_per_s = 35 * kGiga};
}

// Not measured here: the data sheet's dense bf16 FLOP/s and bytes/s times what an H200 reaches of its own 989
// TFLOP/s and 4.8 TB/s with each kind of kernel; its fixed times and crossings.
Ceilings FromDataSheet(const char* name, double tflops, double gb_per_s, double memory_gb) {
  Ceilings c = H200();
  const double flops = tflops / 989, bytes = gb_per_s / 4800;
  c.name = name;
  c.source = "data sheet x what an H200 reaches of its own; not measured";
  for (double* rate :
       {&c.product_flops, &c.decode_flops, &c.prefill_flops, &c.expert_flops, &c.expert_fp8_flops})
    *rate *= flops;
  for (double* rate : {&c.read_bytes_per_s, &c.expert_bytes_per_s, &c.expert_fp8_bytes_per_s}) *rate *= bytes;
  c.memory_bytes = memory_gb * kGiga;
  return c;
}

Ceilings H100() {
  Ceilings c = H200();
  c.name = "h100";
  c.source = "measured on an H100: copy, products, experts (docs/gpu_experts.md); the rest as an H200";
  c.read_bytes_per_s = 3021 * kGiga;
  c.expert_bytes_per_s = 2926 * kGiga;
  c.expert_fp8_bytes_per_s = 2700 * kGiga;
  c.expert_flops = 642 * kTera;
  c.expert_fp8_flops = 402 * kTera;
  c.launch_s = 70e-6;
  c.launch_bytes_per_s = 26 * kGiga;
  c.memory_bytes = 85 * kGiga;
  return c;
}

std::vector<Ceilings> BuiltIn() {
  return {H200(), H100(), FromDataSheet("h20", 148, 4000, 103), FromDataSheet("a100", 312, 2039, 85),
          FromDataSheet("l40s", 362, 864, 51)};
}

absl::Status Expected(std::string_view what, const Json& found) {
  std::string text = found.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 80) + "...";
  return absl::InvalidArgumentError(StrCat("expected ", what, ", found ", text));
}

// Beyond anything that is made, in any unit; keeps sums and quotients finite.
constexpr double kMost = 1e24, kLeast = 1e-9;

// object[field], which has to be a number above `least`, times `unit`, into `out`; nothing if it is absent.
absl::Status Take(const Json& object, const char* field, double unit, double& out, double least = 0,
                  bool or_least = false) {
  const auto found = object.find(field);
  if (found == object.end()) return absl::OkStatus();
  const double value =
      found->is_number() ? found->get<double>() * unit : std::numeric_limits<double>::quiet_NaN();
  const bool small = value < least || (value == least && !or_least) || (value > 0 && value < kLeast);
  if (!std::isfinite(value) || small || value > kMost)
    return Expected(StrCat("\"", field, "\" to be a number ", or_least ? "of at least " : "above ", least,
                           ", of a size that there is"),
                    *found);
  out = value;
  return absl::OkStatus();
}

absl::StatusOr<Ceilings> ParseOwn(const Json& json, Ceilings c) {
  struct Field {
    const char* name;
    double unit;
    double* out;
    double least;
    bool or_least;
  };
  const Field fields[] = {{"bf16_tflops", kTera, &c.product_flops, 0, false},
                          {"mla_decode_tflops", kTera, &c.decode_flops, 0, false},
                          {"mla_prefill_tflops", kTera, &c.prefill_flops, 0, false},
                          {"expert_tflops", kTera, &c.expert_flops, 0, false},
                          {"expert_fp8_tflops", kTera, &c.expert_fp8_flops, 0, false},
                          {"read_gb_s", kGiga, &c.read_bytes_per_s, 0, false},
                          {"expert_gb_s", kGiga, &c.expert_bytes_per_s, 0, false},
                          {"expert_fp8_gb_s", kGiga, &c.expert_fp8_bytes_per_s, 0, false},
                          {"memory_gb", kGiga, &c.memory_bytes, 0, false},
                          {"overlap", 1, &c.overlap, 1, true},
                          {"layer_us", 1e-6, &c.layer_s, 0, true},
                          {"crossing_us", 1e-6, &c.crossing_s, 0, true},
                          {"crossing_gb_s", kGiga, &c.crossing_bytes_per_s, 0, true},
                          {"launch_us", 1e-6, &c.launch_s, 0, true},
                          {"launch_gb_s", kGiga, &c.launch_bytes_per_s, 0, true}};
  for (const auto& [key, value] : json.items()) {
    if (key == "name") {
      if (!value.is_string()) return Expected("\"name\" to be a string", value);
      c.name = value.get<std::string>();
      continue;
    }
    const auto field = std::find_if(std::begin(fields), std::end(fields),
                                    [&key = key](const Field& f) { return key == f.name; });
    if (field == std::end(fields))
      return absl::InvalidArgumentError(StrCat("unknown field \"", key.substr(0, 60), "\""));
  }
  for (const Field& f : fields) MK_RETURN_IF_ERROR(Take(json, f.name, f.unit, *f.out, f.least, f.or_least));
  return c;
}

// What the file does not have comes from what it has: a processor nobody measured further.
void FillUp(Ceilings& c) {
  if (c.decode_flops <= 0) c.decode_flops = c.product_flops;
  if (c.prefill_flops <= 0) c.prefill_flops = c.product_flops;
  if (c.expert_flops <= 0) c.expert_flops = c.product_flops;
  if (c.expert_bytes_per_s <= 0) c.expert_bytes_per_s = c.read_bytes_per_s;
}

// bench/gpu/run: the best row of each kind.
absl::StatusOr<Ceilings> ParseGpuBench(const Json& json, Ceilings c) {
  MK_RETURN_IF_ERROR(Take(json, "copy_gbps", kGiga, c.read_bytes_per_s));
  MK_RETURN_IF_ERROR(Take(json, "product_tflops", kTera, c.product_flops));
  const auto device = json.find("device");
  if (device != json.end() && device->is_string()) c.name = device->get<std::string>();
  const auto rows = json.find("rows");
  if (rows == json.end()) return c;
  if (!rows->is_array()) return Expected("\"rows\" to be a list", *rows);
  const auto best = [&](std::string_view begin, const char* field, double unit, double& out) -> absl::Status {
    double most = 0;
    for (const Json& row : *rows) {
      const auto work = row.is_object() ? row.find("work") : row.end();
      if (!row.is_object() || work == row.end() || !work->is_string())
        return Expected("rows with \"work\"", row);
      if (!StdView(work->get_ref<const std::string&>()).starts_with(begin)) continue;
      double rate = 0;
      MK_RETURN_IF_ERROR(Take(row, field, unit, rate, 0, true));
      most = std::max(most, rate);
    }
    if (most > 0) out = most;
    return absl::OkStatus();
  };
  MK_RETURN_IF_ERROR(best("MLA decode, 128 heads", "tflops", kTera, c.decode_flops));
  MK_RETURN_IF_ERROR(best("MLA prefill, 128 heads", "tflops", kTera, c.prefill_flops));
  MK_RETURN_IF_ERROR(best("FFN bf16", "tflops", kTera, c.expert_flops));
  MK_RETURN_IF_ERROR(best("FFN bf16", "gbps", kGiga, c.expert_bytes_per_s));
  MK_RETURN_IF_ERROR(best("FFN fp8", "tflops", kTera, c.expert_fp8_flops));
  MK_RETURN_IF_ERROR(best("FFN fp8", "gbps", kGiga, c.expert_fp8_bytes_per_s));
  return c;
}

// minke bench kernels: the ceilings, and of grouped experts what they reach where they read (the best rate)
// and where they multiply (what the row with the most FLOP/s takes beyond reading).
absl::StatusOr<Ceilings> ParseKernelsBench(const Json& context, const Json& json, Ceilings c) {
  c.overlap = 1;  // measured: docs/planner.md
  c.layer_s = c.crossing_s = c.crossing_bytes_per_s = c.launch_s = c.launch_bytes_per_s = 0;
  const Json& ceilings = context["ceilings"];
  if (!ceilings.is_object()) return Expected("\"ceilings\" to be an object", ceilings);
  MK_RETURN_IF_ERROR(Take(ceilings, "read_bytes_per_second", 1, c.read_bytes_per_s));
  MK_RETURN_IF_ERROR(Take(ceilings, "bf16_flops_per_second", 1, c.product_flops));
  c.decode_flops = c.prefill_flops = c.expert_flops = c.expert_bytes_per_s = 0;
  if (c.name.empty()) c.name = "cpu";
  const auto rows = json.find("benchmarks");
  if (rows == json.end()) return c;
  if (!rows->is_array()) return Expected("\"benchmarks\" to be a list", *rows);
  double most_flops = 0, most_seconds = 0, most_bytes = 0;
  for (const Json& row : *rows) {
    const auto name = row.is_object() ? row.find("name") : row.end();
    if (!row.is_object() || name == row.end() || !name->is_string())
      return Expected("benchmarks with \"name\"", row);
    double gflops = 0, rate = 0, bytes = 0, flops = 0;
    MK_RETURN_IF_ERROR(Take(row, "GFLOP/s", kGiga, gflops, 0, true));
    MK_RETURN_IF_ERROR(Take(row, "bytes_per_second", 1, rate, 0, true));
    MK_RETURN_IF_ERROR(Take(row, "bytes", 1, bytes, 0, true));
    MK_RETURN_IF_ERROR(Take(row, "flops", 1, flops, 0, true));
    const std::string_view kernel = StdView(name->get_ref<const std::string&>());
    if (kernel.starts_with("MlaDecode")) c.decode_flops = std::max(c.decode_flops, gflops);
    if (kernel.starts_with("MlaPrefill")) c.prefill_flops = std::max(c.prefill_flops, gflops);
    if (!kernel.starts_with("GroupedFfn") || gflops <= 0 || rate <= 0) continue;
    c.expert_bytes_per_s = std::max(c.expert_bytes_per_s, rate);
    if (gflops > most_flops) most_flops = gflops, most_seconds = flops / gflops, most_bytes = bytes;
  }
  if (most_flops > 0) {
    const double multiplying = most_seconds - most_bytes / c.expert_bytes_per_s;
    const double flops = most_flops * most_seconds;
    c.expert_flops = multiplying > 0 ? std::min(c.product_flops, flops / multiplying) : c.product_flops;
  }
  return c;
}

// bench/cpu_table: the medians of what was measured around each sample.
absl::StatusOr<Ceilings> ParseCpuTable(const Json& json, Ceilings c) {
  std::vector<double> gb_per_s, gflops;
  for (const char* part : {"serve", "up"}) {
    const auto rows = json.find(part);
    if (rows == json.end()) continue;
    if (!rows->is_object()) return Expected(StrCat("\"", part, "\" to be an object"), *rows);
    for (const auto& [key, value] : rows->items()) {
      double rate = 0;
      if (key.starts_with("GB/s ") || key.starts_with("GFLOP/s ")) {
        MK_RETURN_IF_ERROR(Take(*rows, key.c_str(), kGiga, rate));
        (key.starts_with("GB/s ") ? gb_per_s : gflops).push_back(rate);
      }
    }
  }
  if (gb_per_s.empty() || gflops.empty())
    return absl::InvalidArgumentError(
        "expected \"GB/s ...\" and \"GFLOP/s ...\" of bench/cpu_table, found none");
  const auto median = [](std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  };
  c.overlap = 1;
  c.layer_s = c.crossing_s = c.crossing_bytes_per_s = c.launch_s = c.launch_bytes_per_s = 0;
  c.read_bytes_per_s = median(gb_per_s);
  c.product_flops = median(gflops);
  c.decode_flops = c.prefill_flops = c.expert_flops = c.expert_bytes_per_s = 0;
  if (c.name.empty()) c.name = "cpu";
  return c;
}

}  // namespace

double Ceilings::Roof(double bytes, double bytes_per_s, double flops, double flops_per_s) const {
  const double read = bytes / bytes_per_s, multiply = flops / flops_per_s;
  const double longer = std::max(read, multiply), shorter = std::min(read, multiply);
  if (longer <= 0 || overlap >= 64) return longer;
  return longer * std::pow(1 + std::pow(shorter / longer, overlap), 1 / overlap);
}

std::vector<std::string> GpuNames() {
  std::vector<std::string> names;
  for (const Ceilings& c : BuiltIn()) names.push_back(c.name);
  return names;
}

absl::StatusOr<Ceilings> BuiltInCeilings(std::string_view gpu) {
  std::string names;
  for (Ceilings& c : BuiltIn()) {
    if (c.name == gpu) return std::move(c);
    StrAppend(&names, names.empty() ? "" : ", ", c.name);
  }
  return absl::InvalidArgumentError(StrCat("expected one of ", names, ", found ", gpu));
}

absl::StatusOr<Ceilings> ParseCeilings(std::string_view text, Ceilings base) {
  if (NestsTooDeep(text))
    return absl::InvalidArgumentError(
        StrCat("expected at most ", kJsonDepthMax, " levels of nesting, found more"));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("expected a JSON object, found something else");
  const auto context = json.find("context");
  absl::StatusOr<Ceilings> parsed =
      context != json.end() && context->is_object() && context->contains("ceilings")
          ? ParseKernelsBench(*context, json, std::move(base))
      : json.contains("copy_gbps")                    ? ParseGpuBench(json, std::move(base))
      : json.contains("serve") || json.contains("up") ? ParseCpuTable(json, std::move(base))
                                                      : ParseOwn(json, std::move(base));
  MK_RETURN_IF_ERROR(parsed.status());
  FillUp(*parsed);
  return parsed;
}

absl::StatusOr<Ceilings> LoadCeilings(const std::string& path, const Ceilings& base) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(StrCat(path, ": expected a readable file, found none"));
  std::stringstream text;
  text << file.rdbuf();
  absl::StatusOr<Ceilings> parsed = ParseCeilings(text.str(), base);
  if (!parsed.ok()) return Annotate(parsed.status(), path);
  parsed->source = path;
  return parsed;
}

// What an H200 does (docs/gpu_model.md, docs/gpu.md): 24, 21, 31 us a layer at B = 1, 16, 128; a launch's
// tables and flags. Where nothing was fixed before, as in ceilings without crossings, nothing is.
Ceilings WithRowsInGpuMemory(Ceilings c) {
  if (c.crossing_s > 0) c.crossing_s = 21e-6, c.crossing_bytes_per_s = 390 * kGiga;
  if (c.launch_s > 0) c.launch_s = 15e-6, c.launch_bytes_per_s = 2000 * kGiga;
  return c;
}

Ceilings WithoutCrossings(Ceilings c) {
  c.layer_s = c.crossing_s = c.crossing_bytes_per_s = c.launch_s = c.launch_bytes_per_s = 0;
  return c;
}

absl::Status CheckComplete(const Ceilings& c) {
  const auto missing = [&](const char* what) {
    return absl::InvalidArgumentError(StrCat("ceilings of ", c.name.empty() ? "a processor" : c.name.c_str(),
                                             ": expected ", what, ", found none"));
  };
  if (c.product_flops <= 0) return missing("\"bf16_tflops\"");
  if (c.read_bytes_per_s <= 0) return missing("\"read_gb_s\"");
  if (c.memory_bytes <= 0) return missing("\"memory_gb\" (or --memory-gb)");
  return absl::OkStatus();
}

}  // namespace minke::cli
