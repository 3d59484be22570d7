#include "libs/model/config.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "nlohmann/json.hpp"

namespace minke {
namespace {

using testing::HasSubstr;

nlohmann::json Tiny() { return nlohmann::json::parse(testing_support::TinyConfigJson()); }

struct BadField {
  const char* field;
  nlohmann::json value;  // null: removed
};

TEST(ModelConfig, EveryBadFieldIsNamedWithExpectedAndFound) {
  const BadField cases[] = {{"vocab_size", nullptr},
                            {"vocab_size", 0},
                            {"vocab_size", "many"},
                            {"vocab_size", 1e300},
                            {"hidden_size", -4},
                            {"hidden_size", 18446744073709551615ull},
                            {"model_type", "llama"},
                            {"hidden_act", "gelu"},
                            {"attention_bias", true},
                            {"qk_rope_head_dim", 15},
                            {"n_group", 7},
                            {"topk_group", 9},
                            {"num_experts_per_tok", 161},
                            {"scoring_func", "sigmoid"},
                            {"topk_method", "noaux_tc"},
                            {"topk_method", "gready"},
                            {"norm_topk_prob", 1},
                            {"rms_norm_eps", "small"},
                            {"moe_layer_freq", 0},
                            {"eos_token_id", 512},
                            {"bos_token_id", -1},
                            {"rope_scaling", 5},
                            {"num_hidden_layers", 2.5},
                            {"kv_lora_rank", nullptr},
                            {"intermediate_size", nullptr},
                            {"moe_intermediate_size", 0}};
  for (const BadField& bad : cases) {
    nlohmann::json json = Tiny();
    if (bad.value.is_null()) {
      json.erase(bad.field);
    } else {
      json[bad.field] = bad.value;
    }
    const absl::StatusOr<ModelConfig> config = ModelConfig::Parse(json.dump());
    ASSERT_FALSE(config.ok()) << bad.field << " " << bad.value;
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(bad.field));
    EXPECT_THAT(std::string(config.status().message()), HasSubstr("expected"));
    EXPECT_THAT(std::string(config.status().message()), HasSubstr("found"));
  }
  for (const char* text : {"", "[]", "{", "null", "\xff\xfe", "3"})
    EXPECT_FALSE(ModelConfig::Parse(text).ok()) << text;
  nlohmann::json json = Tiny();
  json["rope_scaling"]["type"] = "linear";
  EXPECT_THAT(std::string(ModelConfig::Parse(json.dump()).status().message()),
              HasSubstr("rope_scaling.type"));
}

TEST(ModelConfig, WorkIsBoundedBeforeAnybodyCountsOnIt) {
  // Errors write out what they found, which recursed until the stack's end.
  const std::string deep = "{\"model_type\": " + std::string(200'000, '[') + std::string(200'000, ']') + "}";
  EXPECT_THAT(std::string(ModelConfig::Parse(deep).status().message()), HasSubstr("levels of nesting"));
  // A name for each tensor of 60,000 layers of 65,528 experts would not fit a memory.
  nlohmann::json json = Tiny();
  json["num_hidden_layers"] = 60'000;
  json["n_routed_experts"] = 65'528;
  EXPECT_THAT(std::string(ModelConfig::Parse(json.dump()).status().message()),
              HasSubstr("n_routed_experts: expected at most 17 with 60000 layers, found 65528"));
}

TEST(ModelConfig, RopeParametersIsTheNewerSpellingOfRopeScaling) {
  nlohmann::json json = Tiny();
  const uint64_t hash = ModelConfig::Parse(json.dump())->Hash();
  json["rope_parameters"] = json["rope_scaling"];
  json.erase("rope_scaling");
  json["rope_parameters"]["rope_type"] = json["rope_parameters"]["type"];
  json["rope_parameters"].erase("type");
  EXPECT_EQ(ModelConfig::Parse(json.dump())->Hash(), hash);
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000}};
  const ModelConfig plain = ModelConfig::Parse(json.dump()).value();
  EXPECT_FALSE(plain.yarn.has_value());
  EXPECT_EQ(plain.rope_theta, 5000);
  EXPECT_NE(plain.Hash(), hash);
}

TEST(ModelConfig, LiteHasNoQueryCompressionWhateverItsDepth) {
  nlohmann::json json = Tiny();
  json["q_lora_rank"] = nullptr;
  EXPECT_EQ(ModelConfig::Parse(json.dump())->q_lora_rank, 0);
}

TEST(ModelConfig, GroupsPartitionTheExperts) {
  for (const auto& [experts, limited, groups] :
       {std::tuple{160, true, 8}, {64, false, 1}, {20, false, 1}, {5, false, 1}, {24, true, 4}}) {
    ModelConfig c = testing_support::TinyConfig();
    c.n_routed_experts = experts;
    c.n_group = groups;
    c.topk_method = limited ? TopkMethod::kGroupLimitedGreedy : TopkMethod::kGreedy;
    EXPECT_EQ(c.placement_groups(), limited ? groups : std::min(8, experts));
    int32_t next = 0;
    for (int32_t g = 0; g < c.placement_groups(); ++g) {
      const ExpertRange range = c.GroupExperts(g);
      EXPECT_EQ(range.begin, next);
      EXPECT_GT(range.size(), 0);
      for (int32_t e = range.begin; e < range.end; ++e) EXPECT_EQ(c.GroupOfExpert(e), g);
      next = range.end;
    }
    EXPECT_EQ(next, experts);
  }
}

TEST(ModelConfig, FanOutIsBoundedByTheDeviceLimit) {
  ModelConfig c = testing_support::TinyConfig();
  EXPECT_EQ(c.fan_out_max(), 3);
  c.topk_method = TopkMethod::kGreedy;
  EXPECT_EQ(c.fan_out_max(), 6);
}

}  // namespace
}  // namespace minke
