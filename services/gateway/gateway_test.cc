// The gateway's pure parts: parsing, validation, stop strings, errors, keys. Its sockets are tested with
// whole clusters (tests/e2e).
#include <filesystem>
#include <fstream>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/gateway/generation/stop_matcher.h"
#include "services/gateway/openai/error.h"
#include "services/gateway/openai/request.h"

namespace minke::gateway {
namespace {

using nlohmann::json;
using testing::HasSubstr;

GatewayModel IdsOnly() {
  GatewayModel model;
  model.name = "small";
  model.vocab_size = 512;
  model.context_length = 100;
  model.eos_token_ids = {1};
  model.no_chat_reason = "the checkpoint has no tokenizer";
  return model;
}

std::variant<GenerateRequest, ApiError> Parse(const json& change,
                                              Endpoint endpoint = Endpoint::kCompletions) {
  json body = {{"prompt", {5, 6, 7}}, {"max_tokens", 4}};
  for (const auto& [key, value] : change.items()) body[key] = value;
  return ParseRequest(endpoint, body.dump(), IdsOnly());
}

struct Refusal {
  json change;
  std::string param;
};

TEST(ParseRequest, EveryBadFieldIsNamed) {
  const std::vector<Refusal> refusals = {
      {{{"prompt", json::array()}}, "prompt"},
      {{{"prompt", ""}}, "prompt"},
      {{{"prompt", "text"}}, "prompt"},
      {{{"prompt", {512}}}, "prompt"},
      {{{"prompt", {-1}}}, "prompt"},
      {{{"prompt", {1.5}}}, "prompt"},
      {{{"prompt", {{5}, json::array()}}}, "prompt"},
      {{{"prompt", json::object()}}, "prompt"},
      {{{"prompt", nullptr}}, "prompt"},
      {{{"max_tokens", -1}}, "max_tokens"},
      {{{"max_tokens", "4"}}, "max_tokens"},
      {{{"max_tokens", 98}}, "max_tokens"},
      {{{"max_tokens", 1e30}}, "max_tokens"},
      {{{"temperature", 2.1}}, "temperature"},
      {{{"temperature", -0.1}}, "temperature"},
      {{{"temperature", "hot"}}, "temperature"},
      {{{"top_p", 0}}, "top_p"},
      {{{"top_p", 1.01}}, "top_p"},
      {{{"n", 0}}, "n"},
      {{{"n", 1.5}}, "n"},
      {{{"n", 100000}}, "n"},
      {{{"logprobs", 21}}, "logprobs"},
      {{{"logprobs", -1}}, "logprobs"},
      {{{"stop", 5}}, "stop"},
      {{{"stop", {"a", 1}}}, "stop"},
      {{{"logit_bias", {{"512", 1}}}}, "logit_bias"},
      {{{"logit_bias", {{"x", 1}}}}, "logit_bias"},
      {{{"tools", {{{"type", "function"}}}}}, "tools"},
      {{{"response_format", {{"type", "json_object"}}}}, "response_format"},
      {{{"best_of", 3}}, "best_of"},
      {{{"stream", "yes"}}, "stream"},
      {{{"presence_penalty", "x"}}, "presence_penalty"}};
  for (const Refusal& refusal : refusals) {
    const auto parsed = Parse(refusal.change);
    const ApiError* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << refusal.change;
    EXPECT_EQ(error->http_status, 400) << refusal.change;
    EXPECT_EQ(error->param, refusal.param) << refusal.change << error->message;
    EXPECT_FALSE(error->message.empty());
  }
}

TEST(ParseRequest, BodiesThatAreNoObjectAreRefused) {
  for (const std::string body :
       {"", "{", "[]", "3", "null", "{\"prompt\": [5], }", "{\"prompt\": [5], \"max_tokens\": 1e999}",
        "{\"prompt\": \"\xff\xfe\"}", "\x00"}) {
    EXPECT_TRUE(std::holds_alternative<ApiError>(ParseRequest(Endpoint::kCompletions, body, IdsOnly())))
        << body;
  }
  EXPECT_TRUE(std::holds_alternative<ApiError>(
      ParseRequest(Endpoint::kCompletions, std::string(1 << 20, '['), IdsOnly())));
}

TEST(ParseRequest, RandomDamageNeverCrashes) {
  std::mt19937 rng(1);
  const std::string good =
      R"({"prompt": [[5, 6], [7]], "max_tokens": 4, "stop": ["a", "é"], "logit_bias": {"3": -1.5}})";
  for (int i = 0; i < 20000; ++i) {
    std::string body = good;
    for (int k = 1 + rng() % 4; k > 0; --k) body[rng() % body.size()] = static_cast<char>(rng());
    (void)ParseRequest(Endpoint::kCompletions, body, IdsOnly());
  }
}

TEST(ParseRequest, ChatAndTextNeedATokenizer) {
  const auto chat =
      ParseRequest(Endpoint::kChat, R"({"messages": [{"role": "user", "content": "x"}]})", IdsOnly());
  ASSERT_TRUE(std::holds_alternative<ApiError>(chat));
  EXPECT_EQ(std::get<ApiError>(chat).http_status, 400);
}

TEST(ParseRequest, ReadsWhatClientsSend) {
  const auto parsed = Parse({{"prompt", {{5, 6}, {7}}},
                             {"n", 3},
                             {"stream", true},
                             {"stream_options", {{"include_usage", true}}},
                             {"seed", 11},
                             {"temperature", 0.5},
                             {"top_p", 0.9},
                             {"top_k", 40},
                             {"min_p", 0.05},
                             {"logit_bias", {{"7", -100}}},
                             {"logprobs", 2},
                             {"echo", true},
                             {"return_token_ids", true},
                             {"user", "someone"},
                             {"unknown", {{"nested", {1, 2}}}}});
  ASSERT_TRUE(std::holds_alternative<GenerateRequest>(parsed)) << std::get<ApiError>(parsed).message;
  const GenerateRequest& r = std::get<GenerateRequest>(parsed);
  EXPECT_EQ(r.num_sequences(), 6u);
  EXPECT_EQ(*r.prompts[0].ids, (TokenIds{5, 6}));  // as given, no BOS
  EXPECT_TRUE(r.stream && r.include_usage && r.echo && r.return_token_ids);
  EXPECT_EQ(r.sampling.seed, 11u);
  EXPECT_EQ(r.sampling.max_tokens, 4u);
  EXPECT_EQ(r.sampling.top_k, 40u);
  EXPECT_FLOAT_EQ(r.sampling.temperature, 0.5f);
  EXPECT_EQ(r.sampling.logit_bias.size(), 1u);
  EXPECT_EQ(r.sampling.logprobs, 2u);
  EXPECT_TRUE(r.sampling.prompt_logprobs);
  EXPECT_EQ(r.sampling.stop_token_ids, TokenIds{1});
  EXPECT_TRUE(std::get<GenerateRequest>(Parse({{"ignore_eos", true}})).sampling.stop_token_ids.empty());
}

TEST(ParseRequest, PromptAndMaxTokensMayFillTheContextExactly) {
  EXPECT_TRUE(std::holds_alternative<GenerateRequest>(Parse({{"max_tokens", 97}})));
  EXPECT_TRUE(std::holds_alternative<ApiError>(Parse({{"max_tokens", 98}})));
}

TEST(StopMatcher, HoldsBackWhatMayBecomeAStopString) {
  StopMatcher matcher({"END", "\n\n"});
  EXPECT_EQ(matcher.Push("text E"), "text ");
  EXPECT_EQ(matcher.Push("N"), "");
  EXPECT_EQ(matcher.Push("T"), "ENT");
  EXPECT_EQ(matcher.Push("a\n"), "a");
  EXPECT_EQ(matcher.Push("\nb"), "");
  EXPECT_TRUE(matcher.matched());
  EXPECT_EQ(matcher.Push("more"), "");
}

TEST(StopMatcher, AgreesWithASearchOfTheWholeTextHoweverItIsCut) {
  std::mt19937 rng(2);
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    for (int i = 0; i < 30; ++i) text += "ab"[rng() % 2];
    std::vector<std::string> stops;
    for (int s = 1 + rng() % 3; s > 0; --s) {
      std::string stop;
      for (int i = 2 + rng() % 5; i > 0; --i) stop += "ab"[rng() % 2];
      stops.push_back(stop);
    }
    size_t end = std::string::npos;  // of the text before the stop string that is complete first
    size_t complete = std::string::npos;
    for (const std::string& stop : stops) {
      const size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < complete || (at + stop.size() == complete && at < end))
        complete = at + stop.size(), end = at;
    }
    StopMatcher matcher(stops);
    std::string shown;
    for (size_t at = 0; at < text.size();) {
      const size_t n = 1 + rng() % 4;
      shown += matcher.Push(std::string_view(text).substr(at, n));
      at += n;
    }
    const bool matched = matcher.matched();
    shown += matcher.Finish();
    EXPECT_EQ(matched, end != std::string::npos);
    if (!matched) {
      EXPECT_EQ(shown, text);
    }
    for (const std::string& stop : stops)
      EXPECT_EQ(shown.find(stop), std::string::npos) << text << " " << stop;
    EXPECT_EQ(text.substr(0, shown.size()), shown);
  }
}

TEST(ApiError, HasOpenAisShapeWhateverTheMessage) {
  const json body = json::parse(ErrorBody(BadField("n", "n: \"quoted\" \xff and\nmore")));
  EXPECT_EQ(body["error"]["param"], "n");
  EXPECT_EQ(body["error"]["code"], nullptr);
  EXPECT_EQ(body["error"].size(), 4u);
}

TEST(ApiError, FollowsTheClustersStatus) {
  EXPECT_EQ(FromStatus(absl::ResourceExhaustedError("full")).http_status, 429);
  EXPECT_GT(FromStatus(absl::ResourceExhaustedError("full")).retry_after_s, 0);
  EXPECT_EQ(FromStatus(absl::UnavailableError("gone")).http_status, 503);
  EXPECT_EQ(FromStatus(absl::InvalidArgumentError("bad")).http_status, 400);
  EXPECT_EQ(FromStatus(absl::InternalError("bug")).http_status, 500);
}

}  // namespace
}  // namespace minke::gateway
