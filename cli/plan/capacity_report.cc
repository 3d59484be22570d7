#include "cli/plan/capacity_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"

namespace minke::cli {
namespace {

using Json = nlohmann::ordered_json;

int64_t CacheMib(const CapacityModel& model, const Plan& plan) {
  return static_cast<int64_t>(std::ceil(model.AttentionMemory(plan.pools).cache / (1 << 20)));
}

int ExpertServers(const Plan& plan) { return plan.pools.experts + plan.spare_experts; }
int AttentionNodes(const Plan& plan) { return plan.pools.attention + plan.spare_attention; }
const char* Format(const CapacityModel& model) {
  return model.hardware().format == ExpertsFormat::kFP8 ? "fp8" : "bf16";
}

std::string UpFlags(const CapacityModel& model, const Plan& plan) {
  return absl::StrFormat(
      "--attention %d --experts %d --routers %d --replicas %d --microbatches %d --sequences %d --cache-mib "
      "%d "
      "--step-tokens %d --experts-format %s --routing %s",
      AttentionNodes(plan), ExpertServers(plan), plan.routers, model.hardware().replicas,
      plan.pools.microbatches, plan.pools.sequences, CacheMib(model, plan), model.workload().step_tokens,
      Format(model), model.hardware().crossings > 2 ? "remote" : "local");
}

// Values of deploy/helm/minke.
Json HelmValues(const CapacityModel& model, const Plan& plan) {
  const auto flag = [](const char* name, const auto& value) { return StrCat("--", name, "=", value); };
  Json attention = {flag("microbatches", plan.pools.microbatches), flag("sequences", plan.pools.sequences),
                    flag("step-tokens", model.workload().step_tokens)};
  if (model.hardware().crossings <= 2) attention.push_back(flag("routing", "local"));
  return {{"router", {{"replicas", std::max(2, plan.routers)}, {"unitReplicas", model.hardware().replicas}}},
          {"attention",
           {{"replicas", AttentionNodes(plan)}, {"cacheMib", CacheMib(model, plan)}, {"args", attention}}},
          {"expert", {{"replicas", ExpertServers(plan)}, {"args", {flag("experts-format", Format(model))}}}}};
}

Json ToJson(const Memory& m) {
  return {{"weights_bytes", m.weights},
          {"cache_bytes", m.cache},
          {"workspace_bytes", m.workspace},
          {"usable_bytes", m.total},
          {"used_share", m.share()}};
}

Json ToJson(const Ceilings& c) {
  return {{"name", c.name},
          {"source", c.source},
          {"product_flops", c.product_flops},
          {"decode_flops", c.decode_flops},
          {"prefill_flops", c.prefill_flops},
          {"expert_flops", c.expert_flops},
          {"read_bytes_per_s", c.read_bytes_per_s},
          {"expert_bytes_per_s", c.expert_bytes_per_s},
          {"memory_bytes", c.memory_bytes},
          {"overlap", c.overlap}};
}

Json ToJson(const CapacityModel& model, const Plan& plan) {
  const LayerTimes& l = plan.step.layer;
  Json json = {{"attention_nodes", plan.pools.attention},
               {"expert_servers", plan.pools.experts},
               {"routers", plan.routers},
               {"microbatches", plan.pools.microbatches},
               {"sequences_per_attention_node", plan.pools.sequences},
               {"global_batch", plan.pools.attention * plan.pools.sequences},
               {"rows_per_expert", plan.step.rows_per_expert},
               {"tokens_per_s", plan.tokens_per_s},
               {"step_s", plan.step.step_s},
               {"prompt_rows_per_step", plan.step.prompt_rows},
               {"time_to_first_token_s", plan.first_token_s},
               {"price_per_hour", plan.price_per_hour},
               {"price_per_million_tokens", plan.price_per_million},
               {"bound", BoundName(plan.step.bound)},
               {"layer_s",
                {{"round", plan.step.layer_round_s},
                 {"attention", l.attention_s},
                 {"shared_experts", l.shared_s},
                 {"crossing", l.crossing_s},
                 {"gate", l.router_s},
                 {"network", l.network_s},
                 {"experts", l.experts_s},
                 {"experts_busy", l.experts_busy_s},
                 {"network_busy", l.nic_busy_s}}},
               {"dense_layers_s", plan.step.dense_s},
               {"head_s", plan.step.head_s},
               {"attention_memory", ToJson(model.AttentionMemory(plan.pools))},
               {"expert_memory", ToJson(model.ExpertMemory(plan.pools.experts))},
               {"slots_per_expert_server", model.SlotsOf(plan.pools.experts)},
               {"replicas", model.hardware().replicas}};
  if (plan.target_tokens_per_s > 0) {
    json["target"] = {{"clusters", plan.clusters},
                      {"tokens_per_s_of_a_cluster", plan.target_tokens_per_s},
                      {"spare_attention_nodes", plan.spare_attention},
                      {"spare_expert_servers", plan.spare_experts},
                      {"sequences_per_attention_node", plan.target_sequences},
                      {"step_s", plan.target_step_s}};
  }
  return json;
}

void PrintCeilings(const char* role, const Ceilings& c, ExpertsFormat format, bool experts,
                   std::ostream& out) {
  const double flops = !experts                        ? c.product_flops
                       : format == ExpertsFormat::kFP8 ? c.expert_fp8_flops
                                                       : c.expert_flops;
  const double bytes = !experts                        ? c.read_bytes_per_s
                       : format == ExpertsFormat::kFP8 ? c.expert_fp8_bytes_per_s
                                                       : c.expert_bytes_per_s;
  out << absl::StrFormat("%-10s %s: %.4g TFLOP/s, %.4g GB/s, %.4g GB; %s\n", role, c.name, flops / 1e12,
                         bytes / 1e9, c.memory_bytes / 1e9, c.source);
}

void PrintMemory(const char* role, const Memory& m, const std::string& detail, std::ostream& out) {
  out << absl::StrFormat(
      "%-10s %5.1f GB weights + %5.1f cache + %.1f workspace = %3.0f %% of %.1f usable%s\n", role,
      m.weights / 1e9, m.cache / 1e9, m.workspace / 1e9, 100 * m.share(), m.total / 1e9, detail);
}

void PrintStep(const CapacityModel& model, const Plan& plan, std::ostream& out) {
  const LayerTimes& l = plan.step.layer;
  const double m = plan.pools.microbatches, us = 1e6;
  out << absl::StrFormat("\na layer, us          a microbatch   all %d\n", plan.pools.microbatches);
  const auto row = [&](const char* name, double once, double all) {
    out << absl::StrFormat("  %-20s %9.1f", name, once * us);
    if (all > 0) out << absl::StrFormat(" %9.1f", all * us);
    out << "\n";
  };
  row("attention", l.attention_s, 0);
  row("shared experts", l.shared_s, m * (l.attention_s + l.shared_s));
  row("crossing to host", l.crossing_s, m * l.crossing_s);
  row("gate", l.router_s, 0);
  row("network", l.network_s, m * l.nic_busy_s);
  row("experts", l.experts_s, m * l.experts_busy_s);
  out << absl::StrFormat("  %-20s %9s %9.1f  bound by %s\n", "round", "", plan.step.layer_round_s * us,
                         BoundName(plan.step.bound));
  out << absl::StrFormat("step         %d x %.3f + dense layers %.3f + head %.3f = %.2f ms\n",
                         model.cost().moe_layers, plan.step.layer_round_s * 1e3, plan.step.dense_s * 1e3,
                         plan.step.head_s * 1e3, plan.step.step_s * 1e3);
}

std::string Slo(double value_s, double slo_s) {
  return slo_s == kNone ? absl::StrFormat("%.1f ms", value_s * 1e3)
                        : absl::StrFormat("%.1f of %.1f ms", value_s * 1e3, slo_s * 1e3);
}

}  // namespace

std::string Advice(const CapacityModel& model, const Plan& plan) {
  const LayerTimes& l = plan.step.layer;
  const Workload& w = model.workload();
  const bool memory_full = plan.pools.sequences >= model.SequencesMax();
  const bool slo_full = w.tpot_slo_s != kNone && plan.step.step_s > 0.97 * w.tpot_slo_s;
  std::string limit = memory_full ? "; sequences are limited by an attention node's memory"
                      : slo_full  ? "; sequences are limited by --tpot-ms"
                                  : "";
  switch (plan.step.bound) {
    case Bound::kAttention:
      return StrCat("attention nodes compute all the time: more of them, or shorter contexts, move it",
                    limit);
    case Bound::kCrossing:
      return StrCat(
          "the attention nodes' host threads copy rows all the time: more attention nodes, or rows from GPU "
          "to GPU, move it",
          limit);
    case Bound::kExperts: {
      const bool reading = l.experts_reading_s > 0.5 * l.experts_s;
      return StrCat(reading
                        ? "expert servers read weights most of the time: more rows at once (more attention "
                          "nodes), fp8, or fewer expert servers move the price"
                        : "expert servers work on rows all the time: more of them, or a better balance "
                          "(replicas), move it",
                    limit);
    }
    case Bound::kNetwork:
      return StrCat("the network carries rows all the time: a faster one moves it", limit);
    case Bound::kLatency: {
      const std::pair<double, const char*> parts[] = {{l.attention_s, "attention"},
                                                      {l.crossing_s, "crossings to the host"},
                                                      {l.router_s, "the gate"},
                                                      {l.network_s, "the network"},
                                                      {l.experts_s, "experts"}};
      return StrCat("rows wait for their way through the layer, longest in ",
                    std::max_element(std::begin(parts), std::end(parts))->second,
                    ": more microbatches or more sequences fill the wait", limit);
    }
  }
  return "";
}

void PrintPlan(const std::string& model_name, const CapacityModel& model, const SearchResult& result,
               std::ostream& out) {
  const Plan& plan = result.best;
  const Workload& w = model.workload();
  const Hardware& h = model.hardware();
  out << absl::StrFormat("%s, experts %s, context %.0f", model_name, Format(model), w.context);
  if (w.prompt_tokens > 0)
    out << absl::StrFormat(" (prompts %.0f, answers %.0f)", w.prompt_tokens, w.output_tokens);
  out << "\n";
  PrintCeilings("attention", h.attention, h.format, false, out);
  PrintCeilings("experts", h.expert, h.format, true, out);
  out << absl::StrFormat("network    %.3g GB/s, %.3g us a crossing, %d crossings; imbalance %.2f\n\n",
                         h.network_bytes_per_s / 1e9, h.network_latency_s * 1e6, h.crossings, h.imbalance);
  const auto pool = [](int needed, int spare) {
    return spare > 0 ? absl::StrFormat("%d + %d", needed, spare) : absl::StrFormat("%d", needed);
  };
  if (plan.clusters > 1) out << absl::StrFormat("%d clusters, each:\n", plan.clusters);
  out << absl::StrFormat("attention nodes %s, expert servers %s, routers %d, microbatches %d\n",
                         pool(plan.pools.attention, plan.spare_attention),
                         pool(plan.pools.experts, plan.spare_experts), plan.routers, plan.pools.microbatches);
  out << absl::StrFormat(
      "sequences  %d an attention node, %d in all; %.0f rows an expert (arithmetic bound from %.0f)\n",
      plan.pools.sequences, plan.pools.attention * plan.pools.sequences, plan.step.rows_per_expert,
      model.SaturatingRows() * model.cost().experts_per_row / model.cost().experts);
  out << absl::StrFormat("saturated  %.1f attention nodes an expert server\n", model.SaturatedRatio());
  out << "\nmemory\n";
  PrintMemory("attention", model.AttentionMemory(plan.pools), "", out);
  PrintMemory("experts", model.ExpertMemory(plan.pools.experts),
              absl::StrFormat(" (%d slots for %d units, replicas %d)", model.SlotsOf(plan.pools.experts),
                              model.cost().units(), h.replicas),
              out);
  PrintStep(model, plan, out);
  out << absl::StrFormat("\n%.0f tokens/s; time per token %s", plan.tokens_per_s,
                         Slo(plan.step.step_s, w.tpot_slo_s));
  if (w.prompt_tokens > 0)
    out << "; time to first token " << Slo(plan.first_token_s, w.ttft_slo_s)
        << absl::StrFormat("; %.1f requests/s", plan.tokens_per_s / w.output_tokens);
  out << absl::StrFormat("\nprice %.4g an hour, %.4g a million tokens\n", plan.price_per_hour,
                         plan.price_per_million);
  if (plan.target_tokens_per_s > 0)
    out << absl::StrFormat(
        "target %.0f tokens/s a cluster: with all machines %.0f sequences an attention node, %.1f ms per "
        "token; "
        "enough with one of each pool lost; price with the spares %.4g an hour\n",
        plan.target_tokens_per_s, plan.target_sequences, plan.target_step_s * 1e3,
        plan.price_per_hour + h.attention_price + h.expert_price);
  out << "bottleneck " << BoundName(plan.step.bound) << ": " << Advice(model, plan) << "\n";
  if (!result.others.empty()) {
    out << "\nothers: attention  experts  microbatches  sequences   tokens/s  ms/token  price/h  price/M  "
           "bound\n";
    for (const Plan& o : result.others)
      out << absl::StrFormat("        %9d %8d %13d %10d %10.0f %9.1f %8.4g %8.4g  %s\n", o.pools.attention,
                             o.pools.experts, o.pools.microbatches, o.pools.sequences, o.tokens_per_s,
                             o.step.step_s * 1e3, o.price_per_hour, o.price_per_million,
                             BoundName(o.step.bound));
  }
  out << "\nminke up CHECKPOINT " << UpFlags(model, plan)
      << "\nhelm values: " << HelmValues(model, plan).dump() << "\n";
}

Json PlanToJson(const std::string& model_name, const CapacityModel& model, const SearchResult& result) {
  const Workload& w = model.workload();
  Json json = {
      {"model", model_name},
      {"experts_format", Format(model)},
      {"context", w.context},
      {"ceilings",
       {{"attention", ToJson(model.hardware().attention)}, {"expert", ToJson(model.hardware().expert)}}},
      {"cost",
       {{"attention_flops", model.cost().attention_flops},
        {"expert_bytes", model.cost().expert_bytes},
        {"attention_node_bytes", model.cost().attention_node_bytes()},
        {"routed_bytes", model.cost().routed_bytes()},
        {"latent_bytes_per_token", model.cost().latent_bytes_per_token()}}},
      {"saturated_ratio", model.SaturatedRatio()},
      {"plan", ToJson(model, result.best)},
      {"advice", Advice(model, result.best)},
      {"others", Json::array()},
      {"up_flags", UpFlags(model, result.best)},
      {"helm_values", HelmValues(model, result.best)}};
  for (const Plan& other : result.others) json["others"].push_back(ToJson(model, other));
  return json;
}

}  // namespace minke::cli
