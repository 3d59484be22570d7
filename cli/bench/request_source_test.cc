#include "cli/bench/request_source.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

using Json = nlohmann::json;

RequestSource Source(const RequestOptions& options) {
  absl::StatusOr<RequestSource> source = RequestSource::Create(options);
  EXPECT_TRUE(source.ok()) << source.status();
  return *std::move(source);
}

Json Body(const RequestSource& source, int64_t index) { return Json::parse(source.Make(index, "m").body); }

class RequestSourceTest : public ::testing::Test {
 protected:
  std::string File(const std::string& text) {
    const std::string path = ::testing::TempDir() + "/requests-" + std::to_string(files_.size());
    std::ofstream(path, std::ios::binary) << text;
    files_.push_back(path);
    return path;
  }
  void TearDown() override {
    for (const std::string& path : files_) std::filesystem::remove(path);
  }
  std::vector<std::string> files_;
};

TEST_F(RequestSourceTest, BadOptionsNameTheFlag) {
  const auto expect = [](const RequestOptions& options, const std::string& flag) {
    const absl::Status status = RequestSource::Create(options).status();
    EXPECT_FALSE(status.ok()) << flag;
    EXPECT_EQ(std::string(status.message()).rfind(flag, 0), 0u) << status;
    EXPECT_EQ(std::string(status.message()).find('\n'), std::string::npos) << status;
  };
  expect({.prompt_tokens = "none"}, "--prompt-tokens");
  expect({.output_tokens = "0"}, "--output-tokens");
  expect({.prompt_file = "x"}, "--prompt-file");
  expect({.source = PromptSource::kText}, "--prompt-file");
  expect({.source = PromptSource::kText, .prompt_file = "/no/such/file"}, "--prompt-file");
  expect({.source = PromptSource::kText, .prompt_file = ::testing::TempDir()}, "--prompt-file");
  expect({.source = PromptSource::kText, .prompt_file = File("")}, "--prompt-file");
  expect({.source = PromptSource::kJsonl, .prompt_file = File("\n")}, "--prompt-file");
  for (const char* line : {"{", "[]", "{}", "{\"prompt\":1,\"messages\":[]}", "{\"body\":7}"})
    expect({.source = PromptSource::kJsonl, .prompt_file = File(line)}, "--prompt-file");
  expect({.chat = true, .source = PromptSource::kRandomIds}, "--prompt-source");
  expect({.source = PromptSource::kRandomIds, .token_id_min = 5, .token_id_max = 4}, "--token-ids");
  expect(
      {.source = PromptSource::kJsonl, .prompt_file = File("{\"prompt\":\"x\"}"), .shared_prefix_tokens = 1},
      "--shared-prefix-tokens");
  expect({.extra_body = "[1]"}, "--extra-body");
}

TEST_F(RequestSourceTest, ByDefaultOnlyPlainFieldsAreSent) {
  const Json body = Body(Source({}), 0);
  std::set<std::string> keys;
  for (const auto& [key, value] : body.items()) keys.insert(key);
  EXPECT_EQ(keys, (std::set<std::string>{"model", "prompt", "max_tokens", "temperature", "stream",
                                         "stream_options"}));
  EXPECT_EQ(body["model"], "m");
  EXPECT_EQ(body["stream"], true);
  EXPECT_EQ(body["stream_options"], Json({{"include_usage", true}}));
  EXPECT_EQ(body["prompt"].get<std::string>().size(), 512u);
  EXPECT_FALSE(Body(Source({.stream_usage = false}), 0).contains("stream_options"));
}

TEST_F(RequestSourceTest, ExtensionsAndExtraBody) {
  const Json body = Body(Source({.temperature = 0.5,
                                 .ignore_eos = true,
                                 .return_token_ids = true,
                                 .extra_body = R"({"top_p":0.9,"model":"other"})"}),
                         0);
  EXPECT_EQ(body["temperature"], 0.5);
  EXPECT_EQ(body["ignore_eos"], true);
  EXPECT_EQ(body["return_token_ids"], true);
  EXPECT_EQ(body["top_p"], 0.9);
  EXPECT_EQ(body["model"], "other");
}

TEST_F(RequestSourceTest, TheSeedDecidesAndTheOrderDoesNot) {
  const RequestOptions options{.prompt_tokens = "5:50", .output_tokens = "1:1000", .seed = 3};
  const RequestSource a = Source(options), b = Source(options);
  std::set<std::string> bodies;
  for (int64_t i = 0; i < 50; ++i) EXPECT_TRUE(bodies.insert(a.Make(i, "m").body).second);
  for (int64_t i = 49; i >= 0; --i) EXPECT_EQ(b.Make(i, "m").body, a.Make(i, "m").body);
  for (int64_t i = -50; i < 0; ++i)
    EXPECT_TRUE(bodies.insert(a.Make(i, "m").body).second);  // warm-up: others
  RequestOptions other = options;
  other.seed = 4;
  EXPECT_NE(Source(other).Make(0, "m").body, a.Make(0, "m").body);
  other = options;
  other.output_tokens = "7";  // does not change the prompts
  EXPECT_EQ(Body(Source(other), 3)["prompt"], Body(a, 3)["prompt"]);
}

TEST_F(RequestSourceTest, RandomIdsStayInTheirRange) {
  const RequestSource source = Source({.source = PromptSource::kRandomIds,
                                       .prompt_tokens = "1:40",
                                       .shared_prefix_tokens = 6,
                                       .token_id_min = 7,
                                       .token_id_max = 9});
  const Json first = Body(source, 0)["prompt"];
  for (int64_t i = 0; i < 40; ++i) {
    const Request request = source.Make(i, "m");
    const Json prompt = Json::parse(request.body)["prompt"];
    EXPECT_EQ(static_cast<int64_t>(prompt.size()), request.prompt_tokens);
    EXPECT_GE(prompt.size(), 7u);
    for (const Json& id : prompt) EXPECT_TRUE(id >= 7 && id <= 9);
    for (size_t j = 0; j < 6; ++j) EXPECT_EQ(prompt[j], first[j]);
  }
}

TEST_F(RequestSourceTest, ChatCarriesTheTextAsAMessage) {
  const RequestSource source = Source({.chat = true, .prompt_tokens = "10", .shared_prefix_tokens = 5});
  const Request request = source.Make(0, "m");
  EXPECT_EQ(request.path, "/chat/completions");
  EXPECT_EQ(request.prompt_tokens, 15);
  const Json body = Json::parse(request.body);
  ASSERT_EQ(body["messages"].size(), 1u);
  EXPECT_EQ(body["messages"][0]["role"], "user");
  const std::string text = body["messages"][0]["content"], other = Body(source, 1)["messages"][0]["content"];
  EXPECT_EQ(text.size(), 60u);
  EXPECT_EQ(text.substr(0, 20), other.substr(0, 20));
  EXPECT_NE(text, other);
}

TEST_F(RequestSourceTest, PassagesOfATextKeepTheirCharactersWhole) {
  std::string text;
  for (int i = 0; i < 20; ++i) text += "a\xc3\xbc\xe2\x82\xac\xf0\x9f\x90\x8b";  // 1, 2, 3 and 4 bytes
  const RequestSource source = Source({.source = PromptSource::kText,
                                       .prompt_file = File(text),
                                       .prompt_tokens = "1:300",
                                       .chars_per_token = 1});
  for (int64_t i = 0; i < 500; ++i) {
    const Request request = source.Make(i, "m");
    EXPECT_EQ(request.body.find("\\ufffd"), std::string::npos) << request.body;
    EXPECT_EQ(request.body.find("\xef\xbf\xbd"), std::string::npos) << request.body;
    const auto bytes = static_cast<int64_t>(Json::parse(request.body)["prompt"].get<std::string>().size());
    EXPECT_GE(bytes, *request.prompt_tokens);
    EXPECT_LE(bytes, *request.prompt_tokens + 3);
  }
}

TEST_F(RequestSourceTest, ATextOfContinuationBytesEndsToo) {
  const RequestSource source = Source({.source = PromptSource::kText, .prompt_file = File("\x80\x80\x80")});
  for (int64_t i = 0; i < 10; ++i) EXPECT_FALSE(Body(source, i)["prompt"].get<std::string>().empty());
}

TEST_F(RequestSourceTest, RecordedRequestsKeepTheirFields) {
  const std::string path = File(
      "{\"prompt\":[1,2],\"max_tokens\":3,\"temperature\":1,\"stream\":false,\"stream_options\":{},\"top_k\":"
      "4}\n\n"
      "{\"custom_id\":\"a\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"model\":"
      "\"theirs\"}}\r\n");
  const RequestSource source = Source(
      {.source = PromptSource::kJsonl, .prompt_file = path, .output_tokens = "9", .stream_usage = false});
  const Request recorded = source.Make(0, "m"), chat = source.Make(1, "m");
  EXPECT_EQ(recorded.path, "/completions");
  EXPECT_EQ(
      Json::parse(recorded.body),
      Json::parse(R"({"prompt":[1,2],"max_tokens":3,"temperature":1,"stream":true,"top_k":4,"model":"m"})"));
  EXPECT_FALSE(recorded.prompt_tokens);
  EXPECT_EQ(chat.path, "/chat/completions");
  EXPECT_EQ(Json::parse(chat.body)["max_tokens"], 9);
  EXPECT_EQ(Json::parse(chat.body)["model"], "m");
  EXPECT_EQ(source.Make(2, "m").body, recorded.body);
  EXPECT_EQ(source.Make(-1, "m").body, chat.body);
}

}  // namespace
}  // namespace minke::cli::bench
