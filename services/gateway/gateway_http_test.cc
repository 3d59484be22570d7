// The gateway's HTTP API over real sockets, in front of a fake attention node: formats, streams, clients that
// misbehave.
#include <charconv>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/gateway/testing/gateway_fixture.h"

namespace minke::gateway {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr char kCompletions[] = "/v1/completions";
constexpr char kChat[] = "/v1/chat/completions";

using GatewayHttp = GatewayFixture;

std::vector<uint32_t> Ids(std::string_view text) {
  std::vector<uint32_t> ids;
  for (const char c : text) ids.push_back(ByteId(static_cast<unsigned char>(c)));
  return ids;
}

std::string Shortest(float value) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr};
}

TEST_F(GatewayHttp, HealthSaysWhatIsMissingUntilEverythingIsThere) {
  auto gateway = Gateway::Create(options_, Model());
  ASSERT_TRUE(gateway.ok()) << gateway.status();
  gateway_ = *std::move(gateway);
  EXPECT_EQ(Get("/health").status, 503);
  EXPECT_EQ(Get("/health").json()["reason"], "waiting for the router");
  nodes_.push_back(std::make_unique<FakeAttention>());
  SendView(false);
  EXPECT_EQ(Get("/health").json()["reason"], "layer 1 group 2 has no server");
  const auto refused = Post(kCompletions, {{"prompt", "x"}});
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
  EXPECT_EQ(refused.code(), "not_ready");
  SendView(true);
  ASSERT_TRUE(Eventually([this] { return Get("/health").status == 200; }));
  EXPECT_EQ(Get("/health").body, "{\"status\":\"ok\"}");
}

TEST_F(GatewayHttp, WholeCompletion) {
  Start(1, "Hello, world. ");
  const auto answer = Post(kCompletions, {{"model", "small"},
                                          {"prompt", "Hi"},
                                          {"max_tokens", 12},
                                          {"seed", 0},
                                          {"return_token_ids", true},
                                          {"unknown", {{"field", 1}}}});
  ASSERT_EQ(answer.status, 200) << answer.body;
  const json body = answer.json();
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["model"], "small");
  EXPECT_THAT(body["id"].get<std::string>(), ::testing::StartsWith("cmpl-"));
  const json& choice = body["choices"][0];
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["text"], "Hello, world");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["logprobs"], nullptr);
  EXPECT_EQ(choice["token_ids"], Ids("Hello, world"));
  std::vector<uint32_t> prompt = Ids("Hi");
  prompt.insert(prompt.begin(), 0);  // text prompts begin with BOS
  EXPECT_EQ(choice["prompt_token_ids"], prompt);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(body["usage"]["completion_tokens"], 12);
  EXPECT_EQ(body["usage"]["total_tokens"], 15);
  // Token ids are used as given, and 16 tokens are OpenAI's default.
  const json given = Post(kCompletions, {{"prompt", {5, 6}}, {"return_token_ids", true}}).json();
  EXPECT_EQ(given["choices"][0]["prompt_token_ids"], (std::vector<int>{5, 6}));
  EXPECT_EQ(given["usage"]["completion_tokens"], 16);
}

TEST_F(GatewayHttp, StreamHasOneEventPerStepAndTheSameText) {
  Start(1, "héllo 😁 wörld ");
  const json request = {{"prompt", "Hi"},
                        {"max_tokens", 40},
                        {"seed", 0},
                        {"return_token_ids", true},
                        {"stream_options", {{"include_usage", true}}}};
  json whole_request = request;
  whole_request.erase("stream_options");
  const json whole = Post(kCompletions, whole_request).json();
  const auto events = Stream(kCompletions, request);
  ASSERT_EQ(events.size(), 42u);  // a step each, usage, [DONE]
  std::vector<uint32_t> ids;
  for (size_t i = 0; i < 40; ++i) {
    const json& choice = events[i]["choices"][0];
    ASSERT_EQ(choice["token_ids"].size(), 1u);
    ids.push_back(choice["token_ids"][0]);
    EXPECT_EQ(choice.contains("prompt_token_ids"), i == 0);
    EXPECT_EQ(choice["finish_reason"], i == 39 ? json("length") : json(nullptr));
    EXPECT_EQ(events[i]["usage"], nullptr);
    EXPECT_EQ(events[i]["id"], events[0]["id"]);
    EXPECT_EQ(events[i]["object"], "text_completion");
  }
  EXPECT_EQ(json(ids), whole["choices"][0]["token_ids"]);
  EXPECT_EQ(JoinText(events), whole["choices"][0]["text"]);  // events that split a character would not parse
  EXPECT_EQ(events[40]["choices"], json::array());
  EXPECT_EQ(events[40]["usage"]["completion_tokens"], 40);
  EXPECT_EQ(events[41], "[DONE]");
}

TEST_F(GatewayHttp, ChatWholeAndStreamed) {
  Start(1, "Fine.\x03");
  const json request = {{"messages",
                         {{{"role", "developer"}, {"content", "Be brief."}},
                          {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "Hi"}}}}}}},
                        {"seed", 0},
                        {"logprobs", true},
                        {"top_logprobs", 2},
                        {"return_token_ids", true}};
  const auto answer = Post(kChat, request);
  ASSERT_EQ(answer.status, 200) << answer.body;
  const json body = answer.json();
  EXPECT_EQ(body["object"], "chat.completion");
  const json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Fine.");  // the stop token has no text
  EXPECT_EQ(choice["finish_reason"], "stop");
  ASSERT_EQ(choice["logprobs"]["content"].size(), 6u);
  const json& first = choice["logprobs"]["content"][0];
  EXPECT_EQ(first["token"], "F");
  EXPECT_EQ(first["bytes"], (std::vector<int>{'F'}));
  EXPECT_EQ(first["logprob"].get<float>(), FakeLogprob(ByteId('F')));
  ASSERT_EQ(first["top_logprobs"].size(), 2u);
  EXPECT_EQ(first["top_logprobs"][1]["token"], "B");
  std::vector<uint32_t> prompt = Ids("Be brief.\n\nUser: Hi\n\nAssistant:");
  prompt.insert(prompt.begin(), 0);
  EXPECT_EQ(choice["prompt_token_ids"], prompt);

  const auto events = Stream(kChat, request);
  ASSERT_EQ(events.size(), 7u);
  EXPECT_EQ(events[0]["object"], "chat.completion.chunk");
  EXPECT_EQ(events[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(events[0]["choices"][0]["prompt_token_ids"], prompt);
  EXPECT_FALSE(events[1]["choices"][0]["delta"].contains("role"));
  EXPECT_EQ(events[1]["choices"][0]["logprobs"]["content"][0]["token"], "i");
  EXPECT_EQ(JoinText(events), "Fine.");
  EXPECT_EQ(events[5]["choices"][0]["finish_reason"], "stop");
}

TEST_F(GatewayHttp, EchoScoresThePrompt) {
  Start();
  const auto answer = Post(
      kCompletions,
      {{"prompt", "aé!"}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 0}, {"return_token_ids", true}});
  ASSERT_EQ(answer.status, 200) << answer.body;
  const json choice = answer.json()["choices"][0];
  EXPECT_EQ(choice["text"], "aé!");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["token_ids"], json::array());  // never the echoed prompt
  const json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"],
            json::parse(R"(["<｜begin▁of▁sentence｜>", "a", "bytes:\\xc3", "bytes:\\xa9", "!"])"));
  EXPECT_EQ(logprobs["text_offset"], (std::vector<int>{0, 0, 1, 1, 2}));  // characters
  EXPECT_EQ(logprobs["token_logprobs"][0], nullptr);
  EXPECT_EQ(logprobs["top_logprobs"][0], nullptr);
  EXPECT_EQ(logprobs["token_logprobs"][1].get<float>(), FakeLogprob(ByteId('a')));
  EXPECT_EQ(logprobs["top_logprobs"][1].size(), 2u);  // one alternative, and the token itself
  // The shortest decimals that read back as the same f32, not a double's.
  EXPECT_THAT(answer.body, HasSubstr("[null," + Shortest(FakeLogprob(ByteId('a'))) + ","));
}

TEST_F(GatewayHttp, EchoStreamsThePromptFirst) {
  Start(1, "xyz");
  const auto events = Stream(kCompletions, {{"prompt", {ByteId('h'), ByteId('o'), ByteId('!')}},
                                            {"echo", true},
                                            {"logprobs", 0},
                                            {"max_tokens", 2},
                                            {"seed", 0},
                                            {"return_token_ids", true}});
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[0]["choices"][0]["text"], "ho!");
  EXPECT_EQ(events[0]["choices"][0]["token_ids"], json::array());
  EXPECT_EQ(events[0]["choices"][0]["logprobs"]["tokens"], (std::vector<std::string>{"h", "o", "!"}));
  EXPECT_EQ(events[1]["choices"][0]["text"], "x");
  EXPECT_EQ(events[1]["choices"][0]["logprobs"]["text_offset"], (std::vector<int>{3}));
  EXPECT_EQ(events[2]["choices"][0]["finish_reason"], "length");
}

TEST_F(GatewayHttp, ListsOfPromptsAndChoicesAreIndexed) {
  Start(1, "0123456789");
  const json body =
      Post(kCompletions, {{"prompt", {"a", "b"}}, {"n", 3}, {"max_tokens", 4}, {"seed", 2}}).json();
  ASSERT_EQ(body["choices"].size(), 6u);
  const char* expected[] = {"2345", "3456", "4567"};  // choice j draws with seed + j, whichever prompt it is
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(body["choices"][i]["index"], i);
    EXPECT_EQ(body["choices"][i]["text"], expected[i % 3]);
  }
  EXPECT_EQ(body["usage"]["prompt_tokens"], 4);  // a prompt counts once
  EXPECT_EQ(body["usage"]["completion_tokens"], 24);
  std::map<int, std::string> texts;
  for (const json& event :
       Stream(kCompletions, {{"prompt", {{5}, {6}}}, {"n", 2}, {"max_tokens", 3}, {"seed", 1}})) {
    if (event.is_object()) texts[event["choices"][0]["index"]] += event["choices"][0]["text"];
  }
  EXPECT_EQ(texts, (std::map<int, std::string>{{0, "123"}, {1, "234"}, {2, "123"}, {3, "234"}}));
}

TEST_F(GatewayHttp, StopStringsAreNeverShownAndEndTheSequence) {
  Start(1, "one two STOP three ");
  const json request = {{"prompt", "x"}, {"max_tokens", 1000}, {"seed", 0}, {"stop", {"STOP", "nothing"}}};
  const json body = Post(kCompletions, request).json();
  EXPECT_EQ(body["choices"][0]["text"], "one two ");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(body["usage"]["completion_tokens"], 12);
  const auto events = Stream(kCompletions, request);
  EXPECT_EQ(JoinText(events), "one two ");
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
  EXPECT_EQ(nodes_[0]->cancels(), 2);
}

TEST_F(GatewayHttp, EndOfSequenceStopsUnlessIgnored) {
  Start(1,
        "ab\x03"
        "cd");
  const json stopped = Post(kCompletions, {{"prompt", "x"}, {"seed", 0}}).json()["choices"][0];
  EXPECT_EQ(stopped["text"], "ab");
  EXPECT_EQ(stopped["finish_reason"], "stop");
  const json ignored =
      Post(kCompletions, {{"prompt", "x"}, {"seed", 0}, {"max_tokens", 5}, {"ignore_eos", true}})
          .json()["choices"][0];
  EXPECT_EQ(ignored["text"], "abcd");
  EXPECT_EQ(ignored["finish_reason"], "length");
  const json own = Post(kCompletions, {{"prompt", "x"}, {"seed", 0}, {"stop_token_ids", {ByteId('b')}}})
                       .json()["choices"][0];
  EXPECT_EQ(own["text"], "a");
}

TEST_F(GatewayHttp, SamplingReachesTheNode) {
  Start();
  Post(kCompletions, {{"prompt", "x"},
                      {"temperature", 0.5},
                      {"top_p", 0.9},
                      {"top_k", 7},
                      {"min_p", 0.1},
                      {"seed", -1},
                      {"presence_penalty", 1},
                      {"frequency_penalty", -1},
                      {"repetition_penalty", 1.2},
                      {"logit_bias", {{"5", -100}}},
                      {"stop_token_ids", {9}},
                      {"max_tokens", 2}});
  const auto sampling = nodes_[0]->last_submit().sampling();
  EXPECT_EQ(sampling.temperature(), 0.5f);
  EXPECT_EQ(sampling.top_p(), 0.9f);
  EXPECT_EQ(sampling.top_k(), 7u);
  EXPECT_EQ(sampling.min_p(), 0.1f);
  EXPECT_EQ(sampling.seed(), ~uint64_t{0});
  EXPECT_EQ(sampling.presence_penalty(), 1);
  EXPECT_EQ(sampling.frequency_penalty(), -1);
  EXPECT_EQ(sampling.repetition_penalty(), 1.2f);
  ASSERT_EQ(sampling.logit_bias_size(), 1);
  EXPECT_EQ(sampling.logit_bias(0).bias(), -100);
  EXPECT_EQ(std::vector<uint32_t>(sampling.stop_token_ids().begin(), sampling.stop_token_ids().end()),
            (std::vector<uint32_t>{9, 1}));
}

TEST_F(GatewayHttp, ErrorsOfTheClusterKeepTheirMeaning) {
  Start();
  const std::vector<std::pair<grpc::StatusCode, int>> cases = {{grpc::RESOURCE_EXHAUSTED, 429},
                                                               {grpc::UNAVAILABLE, 503},
                                                               {grpc::INVALID_ARGUMENT, 400},
                                                               {grpc::INTERNAL, 500}};
  for (const auto& [code, status] : cases) {
    nodes_[0]->RefuseWith(code);
    for (const bool stream : {false, true}) {
      const auto answer = Post(kCompletions, {{"prompt", "x"}, {"stream", stream}});
      EXPECT_EQ(answer.status, status) << "nothing was sent yet, so a stream has a status too";
      EXPECT_EQ(answer.json()["error"]["message"], "refused by the fake");
      EXPECT_EQ(answer.headers.contains("retry-after"), status == 429 || status == 503);
    }
  }
}

TEST_F(GatewayHttp, PathsMethodsAndModels) {
  Start();
  EXPECT_EQ(Get("/v1/models").json()["data"][0]["id"], "small");
  EXPECT_EQ(Get("/v1/models/small").json()["id"], "small");
  EXPECT_EQ(Get("/v1/models/other").code(), "model_not_found");
  EXPECT_EQ(Post(kCompletions, {{"model", "other"}, {"prompt", "x"}}).code(), "model_not_found");
  EXPECT_EQ(Post(kCompletions, {{"model", "other"}, {"prompt", "x"}}).status, 404);
  EXPECT_TRUE(Get("/version").json().contains("version"));
  EXPECT_EQ(Get("/nothing").status, 404);
  const auto wrong = Get(kChat);
  EXPECT_EQ(wrong.status, 405);
  EXPECT_THAT(wrong.headers.at("allow"), HasSubstr("POST"));
  EXPECT_TRUE(wrong.json()["error"]["message"].is_string());
  EXPECT_EQ(Post("/health", {{"x", 1}}).status, 405);
  EXPECT_EQ(Get("/health?probe=1", "x-request-id: mine-1\r\n").headers.at("x-request-id"), "mine-1");
  EXPECT_NE(Get("/health", "x-request-id: not sane\r\n").headers.at("x-request-id"), "not sane");
  TestClient client(gateway_->port());
  client.Request("HEAD", "/health");
  const auto head = client.Read(/*head_only=*/true);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "15");
  client.Request("OPTIONS", kChat);
  EXPECT_EQ(client.Read(true).status, 204);
}

TEST_F(GatewayHttp, KeepsConnectionsAndTakesPipelinedRequests) {
  Start();
  TestClient client(gateway_->port());
  for (int i = 0; i < 3; ++i) {
    client.Request("POST", kCompletions, json({{"prompt", "x"}, {"stream", i == 1}}).dump());
    EXPECT_EQ(client.Read().status, 200);
  }
  const std::string body = json({{"prompt", "x"}}).dump();
  const std::string one =
      "POST /v1/completions HTTP/1.1\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  client.Send(one + one + "GET /health HTTP/1.1\r\nconnection: close\r\n\r\n");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.Read().status, 200);
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(GatewayHttp, ChunkedBodiesAndExpectContinue) {
  Start();
  TestClient client(gateway_->port());
  client.Send("POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.ReadHead().status, 100);
  client.Send("8\r\n{\"prompt\r\n6\r\n\":\"x\"}\r\n0\r\n\r\n");
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(GatewayHttp, OldClientsGetAStreamThatEndsWithTheConnection) {
  Start(1, "abc");
  TestClient client(gateway_->port());
  const std::string body = json({{"prompt", "x"}, {"stream", true}, {"max_tokens", 3}}).dump();
  client.Send("POST /v1/completions HTTP/1.0\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" +
              body);
  const auto head = client.ReadHead();
  EXPECT_EQ(head.status, 200);
  EXPECT_FALSE(head.headers.contains("transfer-encoding"));
  EXPECT_EQ(head.headers.at("connection"), "close");
  EXPECT_THAT(client.ReadToEnd(), ::testing::EndsWith("data: [DONE]\n\n"));
}

TEST_F(GatewayHttp, HugeBodyGetsIts413AndTheServerGoesOn) {
  options_.http.body_bytes_max = 1 << 20;
  Start();
  TestClient client(gateway_->port());
  ASSERT_TRUE(client.Send("POST /v1/completions HTTP/1.1\r\ncontent-length: 104857600\r\n\r\n"));
  const std::string megabyte(1 << 20, ' ');
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(client.Send(megabyte)) << "the connection was not drained";
  const auto answer = client.Read();
  EXPECT_EQ(answer.status, 413);
  EXPECT_EQ(answer.json()["error"]["type"], "invalid_request_error");
  TestClient chunked(gateway_->port());
  chunked.Send("POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n");
  for (int i = 0; i < 3; ++i) chunked.Send("100000\r\n" + megabyte + "\r\n");
  chunked.Send("0\r\n\r\n");
  EXPECT_EQ(chunked.Read().status, 413);
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 200);
}

TEST_F(GatewayHttp, GarbageIsRefusedAndTheServerGoesOn) {
  options_.http.header_bytes_max = 4096;
  Start();
  const auto send = [this](const std::string& bytes) {
    TestClient client(gateway_->port());
    client.Send(bytes);
    return client.Read().status;
  };
  EXPECT_EQ(send("\x16\x03\x01 not http\r\n\r\n"), 400);
  EXPECT_EQ(send("POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n"), 400);
  EXPECT_EQ(send("GET /health HTTP/1.1\r\nlong: " + std::string(8000, 'x') + "\r\n\r\n"), 431);
  EXPECT_EQ(send("POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"), 400);
  for (const char* body :
       {"{", "[]", "\"x\"", "{\"prompt\":\"\xff\"}", "{\"prompt\":NaN}", "{\"prompt\":[1e999]}", "nul"}) {
    TestClient client(gateway_->port());
    client.Request("POST", kCompletions, body);
    const auto answer = client.Read();
    EXPECT_EQ(answer.status, 400) << body;
    EXPECT_TRUE(answer.json()["error"]["message"].is_string()) << answer.body;
  }
  TestClient deep(gateway_->port());
  deep.Request("POST", kCompletions, std::string(1'000'000, '['));
  EXPECT_EQ(deep.Read().status, 400);
  EXPECT_EQ(Get("/health").status, 200);
}

TEST_F(GatewayHttp, HeadThatNeverEndsIsDropped) {
  options_.http.header_timeout = std::chrono::milliseconds(100);
  options_.http.body_timeout = std::chrono::milliseconds(100);
  options_.http.idle_timeout = std::chrono::milliseconds(100);
  Start();
  for (const char* beginning :
       {"", "GET /health HT", "POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\n\r\n{"}) {
    TestClient client(gateway_->port());
    client.Send(beginning);
    EXPECT_TRUE(client.AtEnd()) << beginning;
  }
}

TEST_F(GatewayHttp, ClientThatLeavesCancelsItsWork) {
  Start();
  nodes_[0]->HoldAfter(3);
  for (const bool stream : {true, false}) {
    TestClient client(gateway_->port());
    client.Request("POST", kCompletions,
                   json({{"prompt", {"a", "b"}}, {"n", 2}, {"max_tokens", 9}, {"stream", stream}}).dump());
    ASSERT_TRUE(Eventually([this] { return Active() == 4; }));
    if (stream) {
      client.ReadHead();
      EXPECT_TRUE(client.ReadEvent());
    }
    client.Close();
    EXPECT_TRUE(Eventually([this] { return Active() == 0 && gateway_->active_sequences() == 0; }));
  }
  EXPECT_EQ(nodes_[0]->cancels(), 8);
  EXPECT_EQ(gateway_->counters().generations_abandoned.load(), 2u);
}

TEST_F(GatewayHttp, ClientThatNeverReadsIsDropped) {
  options_.http.write_timeout = std::chrono::milliseconds(200);
  Start();
  TestClient client(gateway_->port(), /*receive_buffer=*/4096);
  client.Request(
      "POST", kCompletions,
      json({{"prompt", "x"}, {"n", 64}, {"max_tokens", 40'000}, {"logprobs", 20}, {"stream", true}}).dump());
  ASSERT_TRUE(Eventually([this] { return Active() == 64; }));
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
  EXPECT_EQ(Get("/health").status, 200);
}

TEST_F(GatewayHttp, TwoHundredStreamsAtOnce) {
  Start(2, "0123456789");
  for (const auto& node : nodes_) node->HoldAfter(1);
  std::vector<std::unique_ptr<TestClient>> clients;
  for (int i = 0; i < 200; ++i) {
    clients.push_back(std::make_unique<TestClient>(gateway_->port()));
    clients.back()->Request(
        "POST", kCompletions,
        json({{"prompt", "x"}, {"max_tokens", 12}, {"seed", i % 10}, {"stream", true}}).dump());
  }
  ASSERT_TRUE(Eventually([this] { return Active() == 200; }));
  EXPECT_EQ(nodes_[0]->active(), 100);  // the node with the fewest takes the next
  for (const auto& node : nodes_) node->HoldAfter(1 << 20);
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ(clients[i]->ReadHead().status, 200);
    const auto events = ReadEvents(*clients[i]);
    std::string expected;
    for (int k = 0; k < 12; ++k) expected += static_cast<char>('0' + (i + k) % 10);
    EXPECT_EQ(JoinText(events), expected);
    EXPECT_EQ(events.back(), "[DONE]");
  }
  EXPECT_TRUE(Eventually([this] { return gateway_->active_sequences() == 0; }));
}

TEST_F(GatewayHttp, FullGatewayAnswers429) {
  options_.sequences_max = 3;
  Start();
  nodes_[0]->HoldAfter(0);
  TestClient client(gateway_->port());
  client.Request("POST", kCompletions, json({{"prompt", "x"}, {"n", 3}}).dump());
  ASSERT_TRUE(Eventually([this] { return Active() == 3; }));
  const auto refused = Post(kCompletions, {{"prompt", "x"}});
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
  nodes_[0]->HoldAfter(1 << 20);
  EXPECT_EQ(client.Read().status, 200);
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 200);
}

TEST_F(GatewayHttp, TooManyConnectionsAreTurnedAway) {
  options_.http.connections_max = 2;
  Start();
  TestClient first(gateway_->port()), second(gateway_->port());
  ASSERT_TRUE(Eventually([this] { return gateway_->connections() == 2; }));
  TestClient third(gateway_->port());
  EXPECT_EQ(third.ReadHead().status, 503);
  second.Close();
  EXPECT_TRUE(Eventually([this] { return Get("/health").status == 200; }));
}

TEST_F(GatewayHttp, KeysAreAskedForButNotForHealth) {
  const std::string path = folder_ + "/keys";
  std::ofstream(path) << "# ours\nsecret-1\nsecret-2\n";
  options_.api_key_file = path;
  Start();
  EXPECT_EQ(Get("/health").status, 200);
  EXPECT_EQ(Get("/version").status, 200);
  EXPECT_EQ(Get("/v1/models").status, 401);
  EXPECT_EQ(Get("/v1/models").code(), "invalid_api_key");
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}, "authorization: Bearer secret-3\r\n").status, 401);
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}, "authorization: Bearer secret-2\r\n").status, 200);
}

TEST_F(GatewayHttp, PortInUseIsOneClearError) {
  Start();
  options_.http.listen = "127.0.0.1:" + std::to_string(gateway_->port());
  const auto second = Gateway::Create(options_, Model());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("cannot listen on " + options_.http.listen));
  options_.http.listen = "127.0.0.1:0";
  options_.grpc_listen = "127.0.0.1:" + std::to_string(gateway_->grpc_port());
  EXPECT_EQ(Gateway::Create(options_, Model()).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(GatewayHttp, ShutdownLetsStreamsFinishAndDropsTheRest) {
  Start();
  nodes_[0]->HoldAfter(1);
  TestClient quick(gateway_->port()), idle(gateway_->port());
  quick.Request("POST", kCompletions, json({{"prompt", "x"}, {"max_tokens", 5}, {"stream", true}}).dump());
  ASSERT_EQ(quick.ReadHead().status, 200);
  std::thread stop([this] { gateway_->Shutdown(std::chrono::seconds(30)); });
  EXPECT_TRUE(idle.AtEnd());  // a connection without a request is closed at once
  nodes_[0]->HoldAfter(1 << 20);
  EXPECT_EQ(ReadEvents(quick).back(), "[DONE]");
  stop.join();
}

TEST_F(GatewayHttp, ShutdownWithoutGraceDropsWhatIsOpen) {
  Start();
  nodes_[0]->HoldAfter(1);
  TestClient stuck(gateway_->port());
  stuck.Request("POST", kCompletions, json({{"prompt", "x"}, {"max_tokens", 5}, {"stream", true}}).dump());
  ASSERT_EQ(stuck.ReadHead().status, 200);
  gateway_->Shutdown(std::chrono::milliseconds(0));
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
  EXPECT_FALSE(TestClient(gateway_->port()).connected());
}

}  // namespace
}  // namespace minke::gateway
