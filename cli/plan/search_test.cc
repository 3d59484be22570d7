#include "cli/plan/search.h"

#include "cli/plan/capacity_report.h"
#include "cli/plan/published.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Hardware Gpus(const char* name, ExpertsFormat format = ExpertsFormat::kBF16) {
  Hardware h;
  h.attention = h.expert = BuiltInCeilings(name).value();
  h.format = format;
  return h;
}

Workload Requests(double prompt, double output, double tpot_ms = 0) {
  Workload w;
  w.context = prompt + output / 2;
  w.tokens_max = prompt + output;
  w.prompt_tokens = prompt, w.output_tokens = output;
  if (tpot_ms > 0) w.tpot_slo_s = tpot_ms * 1e-3;
  return w;
}

CapacityModel Model(const Hardware& hardware, const Workload& workload, const char* name = "v2") {
  return CapacityModel(PublishedShape(name), hardware, workload);
}

void ExpectSound(const CapacityModel& model, const Plan& plan) {
  EXPECT_LE(model.AttentionMemory(plan.pools).share(), 1);
  EXPECT_LE(model.ExpertMemory(plan.pools.experts).share(), 1);
  EXPECT_LE(plan.step.step_s, model.workload().tpot_slo_s);
  EXPECT_GE(plan.pools.sequences, plan.pools.microbatches);
  EXPECT_GT(plan.tokens_per_s, 0);
  EXPECT_FALSE(Advice(model, plan).empty());
}

TEST(Search, PlansAreSoundForAllKindsOfHardware) {
  for (const char* gpu : {"h200", "h100", "a100", "h20"}) {
    for (const double tpot_ms : {0.0, 60.0, 150.0, 400.0}) {
      for (const ExpertsFormat format : {ExpertsFormat::kBF16, ExpertsFormat::kFP8}) {
        const CapacityModel model = Model(Gpus(gpu, format), Requests(1500, 300, tpot_ms));
        const auto result = Search(model, {.nodes_max = 32});
        if (!result.ok()) {
          EXPECT_THAT(std::string(result.status().message()), HasSubstr("no plan keeps --tpot-ms"));
          continue;
        }
        ExpectSound(model, result->best);
        for (const Plan& other : result->others) ExpectSound(model, other);
      }
    }
  }
}

TEST(Search, AStricterSloIsNeverCheaper) {
  double last = 0;
  for (const double tpot_ms : {1000.0, 400.0, 200.0, 150.0, 100.0, 80.0, 60.0}) {
    const CapacityModel model = Model(Gpus("h200"), Requests(1500, 300, tpot_ms));
    const auto result = Search(model, {.nodes_max = 32, .price_slack = 1});
    ASSERT_TRUE(result.ok()) << tpot_ms << " " << result.status();
    EXPECT_GE(result->best.price_per_million, last * (1 - 1e-9));
    last = result->best.price_per_million;
  }
}

TEST(Search, ADearerPoolNeverMakesTokensCheaperNorItsShareLarger) {
  double last_price = 0, last_share = 1;
  for (const double price : {0.25, 0.5, 1.0, 2.0, 4.0, 8.0}) {
    Hardware h = Gpus("h200");
    h.expert_price = price;
    const CapacityModel model = Model(h, Requests(1500, 300, 150));
    const auto result = Search(model, {.nodes_max = 32, .price_slack = 1});
    ASSERT_TRUE(result.ok()) << result.status();
    const Plan& best = result->best;
    // Expert servers per token: what the price is paid for.
    const double share = best.pools.experts / best.tokens_per_s;
    EXPECT_GE(best.price_per_million, last_price);
    EXPECT_LE(share, last_share * (1 + 1e-9));
    last_price = best.price_per_million, last_share = share;
  }
}

TEST(Search, ATargetIsReachedWithOneMachineOfEachPoolLost) {
  for (const double target : {500.0, 5000.0, 20000.0}) {
    const CapacityModel model = Model(Gpus("h200"), Requests(1500, 300, 150));
    const auto result = Search(model, {.nodes_max = 32, .target_tokens_per_s = target});
    ASSERT_TRUE(result.ok()) << result.status();
    const Plan& best = result->best;
    ExpectSound(model, best);
    EXPECT_GE(best.tokens_per_s * best.clusters, target);
    EXPECT_EQ(best.spare_attention, 1);
    EXPECT_EQ(best.spare_experts, 1);
    EXPECT_LE(best.target_step_s, 0.150);
    EXPECT_LE(best.target_sequences, static_cast<double>(best.pools.sequences));
  }
}

TEST(Search, MoreThanOneClusterCanDoTakesSeveral) {
  const CapacityModel model = Model(Gpus("h200"), Requests(1500, 300, 150));
  const auto small = Search(model, {.nodes_max = 6, .target_tokens_per_s = 40000});
  ASSERT_TRUE(small.ok()) << small.status();
  EXPECT_GT(small->best.clusters, 1);
  const auto never = Search(model, {.nodes_max = 6, .target_tokens_per_s = 1e9});
  EXPECT_THAT(std::string(never.status().message()),
              AllOf(HasSubstr("64 clusters"), HasSubstr("1000000000")));
}

TEST(Search, WhatCannotBeIsExplained) {
  const auto slow = Search(Model(Gpus("h200"), Requests(1500, 300, 5)), {});
  EXPECT_THAT(std::string(slow.status().message()),
              AllOf(HasSubstr("--tpot-ms 5"), HasSubstr("the least is"), HasSubstr("alone too long: ")));
  Workload quick = Requests(100000, 300);
  quick.ttft_slo_s = 0.001;
  EXPECT_THAT(std::string(Search(Model(Gpus("h200"), quick), {}).status().message()),
              AllOf(HasSubstr("--ttft-ms 1"), HasSubstr("100000 prompt tokens")));
  Hardware small = Gpus("h200");
  small.attention.memory_bytes = 20e9;
  EXPECT_THAT(std::string(Search(Model(small, {}), {}).status().message()),
              AllOf(HasSubstr("attention node is too small"), HasSubstr("19.0 GB usable")));
  small = Gpus("h200");
  small.expert.memory_bytes = 20e9;
  EXPECT_THAT(std::string(Search(Model(small, {}), {.nodes_max = 4}).status().message()),
              AllOf(HasSubstr("the experts do not fit"), HasSubstr("4 expert servers")));
  EXPECT_THAT(std::string(Search(Model(small, {}), {.experts = 3}).status().message()),
              AllOf(HasSubstr("do not fit 3 expert servers"), HasSubstr("19.0 GB usable")));
  EXPECT_THAT(
      std::string(Search(Model(Gpus("h200"), {}), {.microbatches = 4, .sequences = 2}).status().message()),
      HasSubstr("4 microbatches need as many sequences"));
}

TEST(Search, GivenPoolsAreKept) {
  const auto result =
      Search(Model(Gpus("h200"), {}), {.attention = 3, .experts = 5, .microbatches = 2, .sequences = 77});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->best.pools.attention, 3);
  EXPECT_EQ(result->best.pools.experts, 5);
  EXPECT_EQ(result->best.pools.microbatches, 2);
  EXPECT_EQ(result->best.pools.sequences, 77);
  EXPECT_TRUE(result->others.empty());
}

TEST(Search, ThirtyFourToSevenIsNearTheBestOfTheWorkedExample) {
  Hardware h = Gpus("h200");
  for (Ceilings* c : {&h.attention, &h.expert}) {
    *c = WithoutCrossings(*c);
    c->product_flops = c->decode_flops = c->expert_flops = 790e12;
    c->read_bytes_per_s = c->expert_bytes_per_s = 4.3e12;
    c->overlap = 64;
  }
  h.network_latency_s = 0, h.network_bytes_per_s = 1e15, h.imbalance = 1, h.memory_share = 1;
  h.router_flops = 1e18;
  const CapacityModel model = Model(h, {});
  const auto best = Search(model, {.nodes_max = 64, .price_slack = 1.02});
  ASSERT_TRUE(best.ok()) << best.status();
  // 7 servers cannot share 8 groups evenly.
  const Plan worked = Evaluate(model, {34, 7, 3, 434});
  EXPECT_LT(worked.price_per_million, 1.08 * best->best.price_per_million);
  const double ratio = static_cast<double>(best->best.pools.attention) / best->best.pools.experts;
  EXPECT_NEAR(ratio, model.SaturatedRatio(), 1);
}

TEST(Report, SaysWhatTheJsonSays) {
  const CapacityModel model = Model(Gpus("h200"), Requests(1500, 300, 150));
  const auto result = Search(model, {.nodes_max = 16, .target_tokens_per_s = 3000});
  ASSERT_TRUE(result.ok());
  const auto json = PlanToJson("v2", model, *result);
  const auto& plan = json["plan"];
  EXPECT_EQ(plan["attention_nodes"], result->best.pools.attention);
  EXPECT_EQ(json["helm_values"]["expert"]["replicas"], result->best.pools.experts + 1);
  std::ostringstream out;
  PrintPlan("v2", model, *result, out);
  EXPECT_THAT(out.str(), HasSubstr(json["up_flags"].get<std::string>()));
  EXPECT_THAT(out.str(), HasSubstr(json["advice"].get<std::string>()));
  EXPECT_THAT(out.str(), HasSubstr("bottleneck " + plan["bound"].get<std::string>()));
}

}  // namespace
}  // namespace minke::cli
