#include "cli/capacity_command.h"

#include <CLI/CLI.hpp>
#include <algorithm>

#include "cli/bench/json_output.h"
#include "cli/plan/capacity_report.h"
#include "cli/plan/published.h"
#include "cli/plan/search.h"
#include "libs/base/status.h"

namespace minke::cli {
namespace {

constexpr const char* kNoGpu = "none";

absl::StatusOr<Ceilings> CeilingsOf(const std::string& gpu, const std::string& file, double memory_gb) {
  Ceilings ceilings;
  if (gpu != kNoGpu) {
    MK_ASSIGN_OR_RETURN(ceilings, BuiltInCeilings(gpu));
  }
  if (!file.empty()) {
    MK_ASSIGN_OR_RETURN(ceilings, LoadCeilings(file, ceilings));
  }
  if (memory_gb > 0) ceilings.memory_bytes = memory_gb * 1e9;
  MK_RETURN_IF_ERROR(CheckComplete(ceilings));
  return ceilings;
}

template <typename T>
const T& Either(const T& own, const T& common) {
  return own == T() ? common : own;
}

absl::StatusOr<Hardware> HardwareOf(const CapacityFlags& f, const PlanModel& model) {
  Hardware h;
  MK_ASSIGN_OR_RETURN(h.attention,
                      CeilingsOf(Either(f.attention_gpu, f.gpu), Either(f.attention_ceilings, f.ceilings),
                                 Either(f.attention_memory_gb, f.memory_gb)));
  MK_ASSIGN_OR_RETURN(h.expert, CeilingsOf(Either(f.expert_gpu, f.gpu), Either(f.expert_ceilings, f.ceilings),
                                           Either(f.expert_memory_gb, f.memory_gb)));
  if (f.gpu_rows) {
    h.attention = WithRowsInGpuMemory(h.attention);
    h.expert = WithRowsInGpuMemory(h.expert);
  }
  if (f.no_crossings) {
    h.attention = WithoutCrossings(h.attention);
    h.expert = WithoutCrossings(h.expert);
  }
  h.format = model.experts_format == "fp8" ? ExpertsFormat::kFP8 : ExpertsFormat::kBF16;
  if (h.format == ExpertsFormat::kFP8 &&
      (h.expert.expert_fp8_flops <= 0 || h.expert.expert_fp8_bytes_per_s <= 0)) {
    return absl::InvalidArgumentError(StrCat(
        "--experts-format=fp8: expected \"expert_fp8_tflops\" and \"expert_fp8_gb_s\" in the ceilings of ",
        h.expert.name, ", found none"));
  }
  h.network_bytes_per_s = f.network_gb_s * 1e9;
  h.network_latency_s = f.latency_us * 1e-6;
  h.crossings = f.routing == "local" ? 2 : 3;
  h.router_flops = f.router_gflop_s * 1e9;
  h.imbalance = f.imbalance;
  h.merged = f.merged;
  h.replicas = model.replicas;
  h.spare_slots = f.spare_slots;
  h.memory_share = f.memory_share;
  h.attention_price = f.attention_price;
  h.expert_price = f.expert_price;
  h.router_price = f.router_price;
  return h;
}

absl::StatusOr<Workload> WorkloadOf(const CapacityFlags& f, const ModelConfig& config) {
  Workload w;
  if (f.context > 0) {
    w.context = w.tokens_max = f.context;
  } else {
    w.context = f.prompt_tokens + f.output_tokens / 2;
    w.tokens_max = f.prompt_tokens + f.output_tokens;
    w.prompt_tokens = f.prompt_tokens * (1 - f.cached_share);
    w.output_tokens = f.output_tokens;
  }
  w.step_tokens = f.step_tokens;
  if (w.tokens_max > config.max_position_embeddings) {
    return absl::InvalidArgumentError(StrCat("expected sequences of at most ", config.max_position_embeddings,
                                             " tokens (max_position_embeddings), found ", w.tokens_max));
  }
  if (f.tpot_ms > 0) w.tpot_slo_s = f.tpot_ms * 1e-3;
  if (f.ttft_ms > 0) {
    if (w.prompt_tokens <= 0)
      return absl::InvalidArgumentError("--ttft-ms: expected --prompt-tokens to compute, found none");
    w.ttft_slo_s = f.ttft_ms * 1e-3;
  }
  return w;
}

}  // namespace

void AddCapacityFlags(CLI::App& app, CapacityFlags& f, CLI::Option* simulate) {
  std::vector<std::string> gpus = GpuNames();
  gpus.emplace_back(kNoGpu);
  const auto number = [&](const char* name, auto& value, const char* what, double least, double most) {
    return app.add_option(name, value, what)
        ->check(CLI::Range(least, most))
        ->capture_default_str()
        ->excludes(simulate);
  };
  const auto text = [&](const char* name, std::string& value, const char* what) {
    return app.add_option(name, value, what)->excludes(simulate);
  };
  text("--gpu", f.gpu, "of both pools; none: all from --ceilings")
      ->check(CLI::IsMember(gpus))
      ->capture_default_str();
  text("--attention-gpu", f.attention_gpu, "of attention nodes (default: --gpu)")->check(CLI::IsMember(gpus));
  text("--expert-gpu", f.expert_gpu, "of expert servers (default: --gpu)")->check(CLI::IsMember(gpus));
  text("--ceilings", f.ceilings, "measured rates, a JSON file of a benchmark or by hand (docs/planner.md)");
  text("--attention-ceilings", f.attention_ceilings, "of attention nodes (default: --ceilings)");
  text("--expert-ceilings", f.expert_ceilings, "of expert servers (default: --ceilings)");
  number("--memory-gb", f.memory_gb, "of a node; 0: of the ceilings", 0, 1e6);
  number("--attention-memory-gb", f.attention_memory_gb, "0: --memory-gb", 0, 1e6);
  number("--expert-memory-gb", f.expert_memory_gb, "0: --memory-gb", 0, 1e6);
  number("--memory-share", f.memory_share, "of a node's memory that may be used", 0.01, 1);
  app.add_flag("--gpu-rows", f.gpu_rows, "rows stay in GPU memory, over a UCX that knows CUDA")
      ->excludes(simulate);
  app.add_flag("--no-crossings", f.no_crossings, "as if rows took no time between GPUs, nor launches")
      ->excludes(simulate);
  CLI::Option* context = number("--context", f.context,
                                "tokens of a sequence, decoding alone (0: by prompts and outputs)", 0, 1e7);
  number("--prompt-tokens", f.prompt_tokens, "of a request", 1, 1e7)->excludes(context);
  number("--output-tokens", f.output_tokens, "of a request", 1, 1e7);
  number("--cached-share", f.cached_share, "of prompts that the prefix cache has", 0, 0.999);
  number("--step-tokens", f.step_tokens, "rows of a step, sequences and prompts together", 1, 65536);
  number("--tpot-ms", f.tpot_ms, "time per output token, at most; 0: any", 0, 1e6);
  number("--ttft-ms", f.ttft_ms, "time to first token, at most; 0: any", 0, 1e7);
  CLI::Option* requests = number("--requests-per-s", f.requests_per_s,
                                 "to serve, with one machine of each pool to spare", 0, 1e9);
  number("--tokens-per-s", f.tokens_per_s, "the same, in generated tokens", 0, 1e12)->excludes(requests);
  number("--attention-price", f.attention_price, "of an attention node, an hour", 1e-6, 1e6);
  number("--expert-price", f.expert_price, "of an expert server, an hour", 1e-6, 1e6);
  number("--router-price", f.router_price, "of a router, an hour", 0, 1e6);
  number("--network", f.network_gb_s, "GB/s of a node, each way", 1e-3, 1e6);
  number("--latency-us", f.latency_us, "of one crossing between two processes", 0, 1e6);
  text("--routing", f.routing, "who gates rows: the router, or the attention node")
      ->check(CLI::IsMember({"remote", "local"}))
      ->capture_default_str();
  number("--router-gflops", f.router_gflop_s, "GFLOP/s of one router's gate: 75 a core, measured", 1e-3, 1e9);
  number("--imbalance", f.imbalance, "rows of the busiest expert server over the mean", 1, 100);
  number("--merged", f.merged, "share of attention nodes whose rows meet in one launch of an expert server",
         0, 1);
  number("--spare-slots", f.spare_slots, "of an expert server, as the router's flag", 0, 1 << 16);
  number("--nodes-max", f.nodes_max, "of either pool", 1, 256);
  number("--microbatches-max", f.microbatches_max, "of a step", 1, 8);
  number("--attention", f.attention, "attention nodes; 0: to be found, as the next three", 0, 256);
  number("--experts", f.experts, "expert servers", 0, 256);
  number("--microbatches", f.microbatches, "of a step", 0, 8);
  number("--sequences", f.sequences, "decoding, per attention node", 0, 16384);
}

absl::Status RunPlanCapacity(const CapacityFlags& flags, const PlanModel& model, const std::string& json,
                             std::ostream& out) {
  MK_RETURN_IF_ERROR(bench::CheckWritable(json));
  MK_ASSIGN_OR_RETURN(const ModelConfig config, ShapeToPlan(model.checkpoint, model.name));
  MK_ASSIGN_OR_RETURN(const Hardware hardware, HardwareOf(flags, model));
  MK_ASSIGN_OR_RETURN(const Workload workload, WorkloadOf(flags, config));
  if (flags.requests_per_s > 0 && flags.context > 0)
    return absl::InvalidArgumentError(
        "--requests-per-s: expected --prompt-tokens and --output-tokens, found --context");
  if (flags.experts > 0 && flags.experts < model.replicas)
    return absl::InvalidArgumentError(
        StrCat("--replicas: expected at most --experts (", flags.experts, "), found ", model.replicas));
  const CapacityModel capacity(config, hardware, workload);
  MK_ASSIGN_OR_RETURN(
      const SearchResult result,
      Search(capacity, {.nodes_max = flags.nodes_max,
                        .microbatches_max = flags.microbatches_max,
                        .attention = flags.attention,
                        .experts = flags.experts,
                        .microbatches = flags.microbatches,
                        .sequences = flags.sequences,
                        .target_tokens_per_s =
                            std::max(flags.tokens_per_s, flags.requests_per_s * flags.output_tokens)}));
  const std::string name = model.checkpoint.empty() ? model.name : model.checkpoint;
  PrintPlan(name, capacity, result, bench::TableStream(json, out));
  return bench::WriteJson(json, PlanToJson(name, capacity, result).dump(2) + "\n", out);
}

}  // namespace minke::cli
