#include "cli/plan_command.h"

#include <CLI/CLI.hpp>
#include <fstream>
#include <map>
#include <sstream>

#include "absl/strings/str_format.h"
#include "cli/bench/json_output.h"
#include "cli/plan/loads.h"
#include "cli/plan/published.h"
#include "cli/plan/simulate.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"
#include "services/router/placement/step_time.h"

namespace minke::cli {
namespace {

const std::map<std::string, LoadPattern>& Patterns() {
  static const std::map<std::string, LoadPattern> patterns = {
      {"zipf", LoadPattern::kZipf}, {"drifting", LoadPattern::kDrifting}, {"bursty", LoadPattern::kBursty}};
  return patterns;
}

absl::StatusOr<LoadSource> Source(const PlanFlags& flags, const ModelConfig& config) {
  auto pattern = Patterns().find(flags.loads);
  if (pattern != Patterns().end()) {
    return LoadSource::Synthetic(config, {.pattern = pattern->second,
                                          .zipf = flags.zipf,
                                          .noise = flags.noise,
                                          .rows = flags.rows,
                                          .drift_period = flags.drift_period,
                                          .seed = flags.seed});
  }
  std::ifstream file(flags.loads, std::ios::binary);
  if (!file)
    return absl::NotFoundError(
        StrCat("--loads: expected zipf, drifting, bursty or a readable file, found ", flags.loads));
  std::stringstream text;
  text << file.rdbuf();
  auto intervals = ParseLoads(config, text.str());
  if (!intervals.ok()) return Annotate(intervals.status(), flags.loads);
  return LoadSource::Recorded(*std::move(intervals));
}

router::PlacementSnapshot Pool(const PlanFlags& flags, const ModelConfig& config) {
  router::PlacementSnapshot pool;
  pool.shape = router::ShapeOfUnits(config, flags.model.experts_format == "fp8" ? 1 : 2);
  pool.replicas = flags.model.replicas;
  const int64_t slots = static_cast<int64_t>(config.MoeLayers().size()) * flags.slots_per_layer;
  for (int i = 0; i < flags.servers; ++i) {
    router::ServerSnapshot& server = pool.servers.emplace_back();
    server.id = NodeId{static_cast<uint64_t>(i) + 1};
    server.slots = (slots + flags.servers - 1) / flags.servers;
    server.bytes_per_s = flags.bandwidth_gb_s * 1e9;
    server.flops_per_s = flags.peak_tflop_s * 1e12;
    if (!flags.speeds.empty()) server.speed = flags.speeds[i % flags.speeds.size()];
    if (flags.hosts > 0) server.host = StrCat("host", i * flags.hosts / flags.servers);
  }
  return pool;
}

nlohmann::json ToJson(const IntervalResult& r) {
  return {{"step_s", r.step_s},
          {"balance", r.balance},
          {"static_step_s", r.static_step_s},
          {"static_balance", r.static_balance},
          {"fan_out", r.fan_out},
          {"loads", r.loads},
          {"drops", r.drops},
          {"bytes_moved", r.bytes_moved}};
}

void PrintRow(const std::string& label, const IntervalResult& r, double intervals, std::ostream& out) {
  out << absl::StrFormat("%8s  %9.2f  %7.3f  %9.2f  %7.3f  %7.2f  %5d  %5d  %8.1f\n", label,
                         r.step_s / intervals * 1e3, r.balance, r.static_step_s / intervals * 1e3,
                         r.static_balance, r.fan_out, r.loads, r.drops, r.bytes_moved / 1e9);
}

void PrintTable(const PlanFlags& flags, const router::PlacementSnapshot& pool, const ModelConfig& config,
                const std::vector<IntervalResult>& results, std::ostream& out) {
  out << absl::StrFormat(
      "%d layers x %d groups of %.1f MB on %d servers of %d slots, loads %s, %g rows a step\n",
      config.MoeLayers().size(), config.placement_groups(), pool.shape.unit_bytes / 1e6, flags.servers,
      pool.servers.front().slots, flags.loads, flags.rows);
  out << "                placed by the policy   first placement\n"
         "  time s    step ms  balance    step ms  balance  fan-out  loads  drops  GB moved\n";
  for (size_t i = 0; i < results.size(); ++i)
    PrintRow(absl::StrFormat("%g", i * flags.interval_s), results[i], 1, out);
  const IntervalResult overall = Overall(results);
  PrintRow("overall", overall, static_cast<double>(results.size()), out);
  out << absl::StrFormat("a plan took %.1f ms at most\n", overall.plan_s * 1e3);
}

}  // namespace

void AddPlanFlags(CLI::App& app, PlanFlags& flags) {
  CLI::Option* simulate =
      app.add_flag("--simulate", flags.simulate, "instead: run the placement policy over simulated time");
  auto* checkpoint =
      app.add_option("--checkpoint", flags.model.checkpoint, "folder whose config.json has the shape")
          ->check(CLI::ExistingDirectory);
  app.add_option("--model", flags.model.name, "a published shape")
      ->check(CLI::IsMember(PublishedNames()))
      ->excludes(checkpoint)
      ->capture_default_str();
  app.add_option("--experts-format", flags.model.experts_format)
      ->check(CLI::IsMember({"bf16", "fp8"}))
      ->capture_default_str();
  app.add_option("--replicas", flags.model.replicas, "of every (layer, group), at least")
      ->check(CLI::Range(1, 320))
      ->capture_default_str();
  app.add_option("--json", flags.json,
                 "write the result there too; -: to standard output, the table to stderr");
  AddCapacityFlags(app, flags.capacity, simulate);
  const auto option = [&](const char* name, auto& value, const char* what = "") {
    return app.add_option(name, value, what)->needs(simulate)->group("With --simulate");
  };
  option("--loads", flags.loads, "zipf, drifting, bursty, or a recorded file (docs/placement.md)")
      ->capture_default_str();
  option("--zipf", flags.zipf, "exponent over the groups of a layer")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
  option("--noise", flags.noise, "of each share and interval, as a fraction")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  option("--rows", flags.rows, "rows of a step, all attention nodes together")
      ->check(CLI::Range(1.0, 1e9))
      ->capture_default_str();
  option("--drift-period", flags.drift_period, "intervals until other groups are the hot ones")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  option("--seed", flags.seed)->capture_default_str();
  option("--servers", flags.servers)->check(CLI::Range(1, 320))->capture_default_str();
  option("--slots-per-layer", flags.slots_per_layer, "room for units of all servers, over layers")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  option("--hosts", flags.hosts, "that the servers lie on; 0: each on its own")
      ->check(CLI::Range(0, 320))
      ->capture_default_str();
  option("--speeds", flags.speeds, "of the servers, taken in turn, such as 1,1,0.5")
      ->delimiter(',')
      ->check(CLI::Range(0.001, 1000.0));
  option("--bandwidth", flags.bandwidth_gb_s, "GB/s at which a server reads weights")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  option("--peak", flags.peak_tflop_s, "TFLOP/s of a server")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str();
  option("--load-bandwidth", flags.load_gb_s, "GB/s at which a server loads units")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  option("--intervals", flags.intervals)->check(CLI::Range(1, 1 << 20))->capture_default_str();
  option("--interval-s", flags.interval_s, "between two decisions")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
}

absl::Status RunPlan(const PlanFlags& flags, std::ostream& out) {
  if (flags.simulate) return RunPlanSimulate(flags, out);
  return RunPlanCapacity(flags.capacity, flags.model, flags.json, out);
}

absl::Status RunPlanSimulate(const PlanFlags& flags, std::ostream& out) {
  MK_RETURN_IF_ERROR(bench::CheckWritable(flags.json));
  MK_ASSIGN_OR_RETURN(const ModelConfig config, ShapeToPlan(flags.model.checkpoint, flags.model.name));
  MK_ASSIGN_OR_RETURN(LoadSource source, Source(flags, config));
  const router::PlacementSnapshot pool = Pool(flags, config);
  SimulateOptions options{
      .intervals = flags.intervals, .interval_s = flags.interval_s, .groups_per_row = config.fan_out_max()};
  options.policy.load_bytes_per_s = flags.load_gb_s * 1e9;
  const std::vector<IntervalResult> results = Simulate(pool, std::move(source), options);
  PrintTable(flags, pool, config, results, bench::TableStream(flags.json, out));
  nlohmann::json json = {{"intervals", nlohmann::json::array()}, {"overall", ToJson(Overall(results))}};
  for (const IntervalResult& result : results) json["intervals"].push_back(ToJson(result));
  return bench::WriteJson(flags.json, json.dump(2) + "\n", out);
}

}  // namespace minke::cli
