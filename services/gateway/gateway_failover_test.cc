// Attention nodes that go away while sequences are aboard, and the gateway's gRPC API.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/cluster/prefix_hash.h"
#include "proto/inference/inference.grpc.pb.h"
#include "services/gateway/testing/gateway_fixture.h"

namespace minke::gateway {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr char kCompletions[] = "/v1/completions";
// Two of them are longer than a thread of a busy machine waits for its turn: a node that is not frozen must
// not seem so.
constexpr std::chrono::milliseconds kShortHeartbeat{200};

class GatewayFailover : public GatewayFixture {
 protected:
  // A stream that stands still after `tokens` tokens, and the node it is on.
  size_t StartHeld(TestClient& client, uint32_t tokens, json body) {
    for (const auto& node : nodes_) node->HoldAfter(tokens);
    body["stream"] = true;
    client.Request("POST", kCompletions, body.dump());
    EXPECT_TRUE(Eventually([this] { return Active() == 1; }));
    return nodes_[0]->active() == 1 ? 0 : 1;
  }
  void Release() {
    for (const auto& node : nodes_) node->HoldAfter(1 << 20);
  }
};

TEST_F(GatewayFailover, LostSessionIsContinuedElsewhereInTheSameStream) {
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first =
      StartHeld(client, 7, {{"prompt", "x"}, {"max_tokens", 25}, {"seed", 3}, {"return_token_ids", true}});
  EXPECT_EQ(client.ReadHead().status, 200);
  std::string text;
  for (int i = 0; i < 7; ++i)
    text += json::parse(*client.ReadEvent())["choices"][0]["text"].get<std::string>();
  nodes_[first]->CutSessions();
  ASSERT_TRUE(Eventually([&] { return nodes_[1 - first]->active() == 1; }));
  const auto submit = nodes_[1 - first]->last_submit();
  EXPECT_EQ(submit.generation(), 1u);
  EXPECT_EQ(submit.generated_token_ids_size(), 7);  // apart from the prompt
  EXPECT_EQ(submit.prompt_token_ids_size(), 2);
  Release();
  const auto events = ReadEvents(client);
  EXPECT_EQ(text + JoinText(events), "3456789012345678901234567");
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(gateway_->counters().resubmissions.load(), 1u);
}

// The node whose cache holds most of a prompt gets it, as long as it has not far more to do than the others.
TEST_F(GatewayFailover, LongestCachedPrefixIsPreferredUnlessItsNodeIsOverloaded) {
  Start(3);
  std::vector<uint32_t> prompt(200);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = 2 + static_cast<uint32_t>(i) % 50;
  const std::vector<uint64_t> names = cluster::PrefixHashes(prompt);
  ASSERT_EQ(names.size(), 3u);
  for (const auto& node : nodes_) node->HoldAfter(0);
  nodes_[1]->SetPrefixes({names[0]}, true);
  nodes_[2]->SetPrefixes({names[0], names[1]}, true);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // longer than the fake's tick

  std::vector<std::unique_ptr<TestClient>> clients;
  const auto send = [&](const std::vector<uint32_t>& ids) {
    clients.push_back(std::make_unique<TestClient>(gateway_->port()));
    clients.back()->Request("POST", kCompletions,
                            json{{"prompt", ids}, {"max_tokens", 1}, {"stream", true}}.dump());
    const int sent = static_cast<int>(clients.size());
    ASSERT_TRUE(Eventually([&] { return Active() == sent; }));
  };
  for (int i = 0; i < 5; ++i) send(prompt);  // up to 2 x 0 + 4 more than the idlest
  EXPECT_EQ(nodes_[2]->active(), 5);
  send(prompt);  // overloaded: the idlest
  EXPECT_EQ(nodes_[0]->active(), 1);
  send({5, 6, 7});  // known nowhere: the idlest
  EXPECT_EQ(nodes_[1]->active(), 1);
  nodes_[2]->SetPrefixes({names[1], names[0]}, false);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  send(prompt);  // what node 2 held is gone: the next best
  EXPECT_EQ(nodes_[1]->active(), 2);
  Release();
  for (const auto& client : clients) {
    EXPECT_EQ(client->ReadHead().status, 200);
    EXPECT_EQ(ReadEvents(*client).back(), "[DONE]");
  }
}

TEST_F(GatewayFailover, EchoedPromptIsNotScoredTwice) {
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(
      client, 2, {{"prompt", "abcdefgh"}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 4}, {"seed", 0}});
  EXPECT_EQ(client.ReadHead().status, 200);
  std::vector<json> events = {json::parse(*client.ReadEvent()), json::parse(*client.ReadEvent())};
  nodes_[first]->CutSessions();
  Release();
  for (json& event : ReadEvents(client)) events.push_back(std::move(event));
  EXPECT_EQ(JoinText(events), "abcdefgh0123");
  size_t tokens = 0;
  for (const json& event : events) {
    if (event.is_object()) tokens += event["choices"][0]["logprobs"]["tokens"].size();
  }
  EXPECT_EQ(tokens, 9u + 4u);
}

TEST_F(GatewayFailover, SequenceAboardTwoLostNodesIsNotGivenToAThird) {
  options_.attention.reconnect_min = options_.attention.reconnect_max = std::chrono::milliseconds(1);
  options_.unready_wait = std::chrono::minutes(1);
  Start(1);
  TestClient client(gateway_->port());
  StartHeld(client, 2, {{"prompt", "x"}, {"max_tokens", 25}});
  EXPECT_EQ(client.ReadHead().status, 200);
  nodes_[0]->CutSessions();
  ASSERT_TRUE(Eventually([this] { return nodes_[0]->submits() == 2; }));  // the same node is back
  nodes_[0]->CutSessions();
  const auto events = ReadEvents(client);
  ASSERT_FALSE(events.empty());
  EXPECT_THAT(events.back()["error"]["message"].get<std::string>(),
              HasSubstr("was aboard 2 attention nodes"));
  EXPECT_EQ(events.back()["error"]["type"], "server_error");
  Release();
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 200);
}

TEST_F(GatewayFailover, NodeThatDoesNotComeBackFailsWith503) {
  options_.attention.node_wait_max = std::chrono::milliseconds(100);
  Start(1);
  TestClient client(gateway_->port());
  nodes_[0]->HoldAfter(0);
  client.Request("POST", kCompletions, json({{"prompt", "x"}}).dump());
  ASSERT_TRUE(Eventually([this] { return Active() == 1; }));
  nodes_.clear();
  const auto answer = client.Read();
  EXPECT_EQ(answer.status, 503);
  EXPECT_THAT(answer.json()["error"]["message"].get<std::string>(), HasSubstr("no attention node"));
  EXPECT_EQ(Get("/health").status, 503);
}

// A router that starts again knows nobody at first.
TEST_F(GatewayFailover, RequestsWaitForAClusterThatWasReady) {
  options_.unready_wait = std::chrono::minutes(1);
  Start(1, "0123456789");
  gateway_->UpdateView({});
  ASSERT_TRUE(Eventually([this] { return Get("/health").status == 503; }));
  TestClient client(gateway_->port());
  client.Request("POST", kCompletions,
                 json({{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}, {"stream", true}}).dump());
  ASSERT_TRUE(Eventually([this] { return gateway_->active_sequences() == 1; }));
  EXPECT_EQ(nodes_[0]->submits(), 0);
  SendView();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
}

TEST_F(GatewayFailover, RequestsAreRefusedWhenTheClusterWasAwayForLong) {
  options_.unready_wait = std::chrono::milliseconds(50);
  Start(1);
  SendView(false);
  EXPECT_TRUE(Eventually([this] {
    const auto answer = Post(kCompletions, {{"prompt", "x"}});
    return answer.status == 503 && answer.code() == "not_ready";
  }));
}

TEST_F(GatewayFailover, NodeThatLeftTheViewHandsItsSequencesOver) {
  options_.attention.absent_grace = std::chrono::milliseconds(10);
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(client, 4, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  // A frozen node's session stays open; only its lease tells.
  cluster::v1::ClusterView view;
  view.set_ready(true);
  cluster::v1::Member* member = view.add_members();
  member->set_node_id(2 - first);
  member->set_role(cluster::v1::ROLE_ATTENTION);
  member->set_rpc_address(nodes_[1 - first]->address());
  member->set_ready(true);
  gateway_->UpdateView(view);
  ASSERT_TRUE(Eventually([&] { return nodes_[1 - first]->active() == 1; }));
  Release();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
}

TEST_F(GatewayFailover, DrainingNodeHandsItsSequencesOverAtOnce) {
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(client, 7, {{"prompt", "x"}, {"max_tokens", 25}, {"seed", 3}});
  EXPECT_EQ(client.ReadHead().status, 200);
  std::string text;
  for (int i = 0; i < 7; ++i)
    text += json::parse(*client.ReadEvent())["choices"][0]["text"].get<std::string>();
  SendView(true, static_cast<int>(first));
  ASSERT_TRUE(Eventually([&] { return nodes_[1 - first]->active() == 1; }));
  EXPECT_TRUE(Eventually([&] { return nodes_[first]->cancels() == 1; }));
  const auto submit = nodes_[1 - first]->last_submit();
  EXPECT_EQ(submit.generation(), 1u);
  EXPECT_EQ(submit.generated_token_ids_size(), 7);
  EXPECT_EQ(submit.pages_from(), first + 1);
  EXPECT_TRUE(Eventually([this] { return gateway_->not_ready_reason().empty(); }));
  Release();
  EXPECT_EQ(text + JoinText(ReadEvents(client)), "3456789012345678901234567");
  EXPECT_EQ(gateway_->counters().migrations.load(), 1u);
  EXPECT_EQ(gateway_->counters().resubmissions.load(), 0u);

  const int before = nodes_[first]->submits();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 200);
  EXPECT_EQ(nodes_[first]->submits(), before);  // nothing new for it
}

TEST_F(GatewayFailover, SilentNodeLosesItsSequencesWithinTwoHeartbeats) {
  options_.attention.heartbeat = kShortHeartbeat;
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(client, 7, {{"prompt", "x"}, {"max_tokens", 25}, {"seed", 3}});
  EXPECT_EQ(client.ReadHead().status, 200);
  std::string text;
  for (int i = 0; i < 7; ++i)
    text += json::parse(*client.ReadEvent())["choices"][0]["text"].get<std::string>();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));  // silent in between, but alive
  EXPECT_EQ(nodes_[first]->submits(), 1);
  nodes_[first]->SetFrozen(true);
  ASSERT_TRUE(Eventually([&] { return nodes_[1 - first]->active() == 1; }));
  const auto submit = nodes_[1 - first]->last_submit();
  EXPECT_EQ(submit.generation(), 1u);
  EXPECT_EQ(submit.generated_token_ids_size(), 7);
  EXPECT_EQ(submit.pages_from(), 0u);  // nobody to ask
  EXPECT_EQ(gateway_->counters().resubmissions.load(), 1u);
  Release();  // the frozen one goes on too, later, and nobody listens
  nodes_[first]->SetFrozen(false);
  EXPECT_EQ(text + JoinText(ReadEvents(client)), "3456789012345678901234567");
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
}

// Nothing is lost when the only node freezes and goes on; and it is not the sequence's fault that it did.
TEST_F(GatewayFailover, SilentNodesThatSpeakAgainAreNotLost) {
  options_.attention.heartbeat = kShortHeartbeat;
  options_.attention.lost_sessions_max = 1;
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  size_t on = StartHeld(client, 2, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  for (int i = 0; i < 3; ++i) {
    nodes_[on]->SetFrozen(true);
    ASSERT_TRUE(Eventually([&] { return nodes_[1 - on]->active() == 1; }));
    nodes_[on]->SetFrozen(false);
    ASSERT_TRUE(Eventually([this] { return Active() == 1; }));
    on = nodes_[0]->active() == 1 ? 0 : 1;  // a busy machine may have made the other one seem silent too
  }
  for (const auto& node : nodes_) node->SetFrozen(true);
  ASSERT_TRUE(Eventually([this] { return !gateway_->not_ready_reason().empty(); }));
  for (const auto& node : nodes_) node->SetFrozen(false);
  Release();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
  EXPECT_TRUE(Eventually([this] { return gateway_->not_ready_reason().empty(); }));
}

// A connection that was cut stays established and says nothing for minutes: a new one is tried.
TEST_F(GatewayFailover, NodeSilentForLongIsConnectedAnew) {
  options_.attention.heartbeat = kShortHeartbeat;
  options_.attention.absent_grace = 5 * kShortHeartbeat;
  options_.attention.lost_sessions_max = 2;
  Start(1, "0123456789");
  TestClient client(gateway_->port());
  StartHeld(client, 4, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  nodes_[0]->SetFrozen(true);
  ASSERT_TRUE(Eventually([this] { return nodes_[0]->active() == 0; }));  // the session has ended
  Release();
  nodes_[0]->SetFrozen(false);
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
  EXPECT_EQ(nodes_[0]->submits(), 2);
}

TEST_F(GatewayFailover, MovedSequenceWaitsForPlaceInAFullQueue) {
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(client, 4, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  nodes_[1 - first]->RefuseWith(grpc::StatusCode::RESOURCE_EXHAUSTED);
  SendView(true, static_cast<int>(first));
  ASSERT_TRUE(Eventually([&] { return nodes_[1 - first]->submits() == 3; }));
  nodes_[1 - first]->RefuseWith(grpc::StatusCode::OK);
  Release();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
}

TEST_F(GatewayFailover, MovedSequenceDoesNotWaitForPlaceForever) {
  options_.attention.node_wait_max = std::chrono::milliseconds(500);
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  const size_t first = StartHeld(client, 0, {{"prompt", "x"}, {"max_tokens", 10}});
  nodes_[1 - first]->RefuseWith(grpc::StatusCode::RESOURCE_EXHAUSTED);
  SendView(true, static_cast<int>(first));
  EXPECT_EQ(client.ReadHead().status, 503);
}

TEST_F(GatewayFailover, MigrationsAreNotLostSessions) {
  options_.attention.lost_sessions_max = 1;
  Start(2, "0123456789");
  TestClient client(gateway_->port());
  size_t on = StartHeld(client, 2, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  for (int i = 0; i < 4; ++i, on = 1 - on) {
    SendView(true, static_cast<int>(on));
    ASSERT_TRUE(Eventually([&] { return nodes_[1 - on]->active() == 1 && nodes_[on]->active() == 0; }));
  }
  EXPECT_EQ(nodes_[on]->last_submit().generation(), 4u);
  Release();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
}

TEST_F(GatewayFailover, SequencesOfTheOnlyNodeFinishWhileItDrains) {
  Start(1, "0123456789");
  TestClient client(gateway_->port());
  StartHeld(client, 3, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  SendView(true, 0);
  ASSERT_TRUE(Eventually([this] { return !gateway_->not_ready_reason().empty(); }));
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 503);
  EXPECT_EQ(nodes_[0]->cancels(), 0);
  Release();
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
  EXPECT_EQ(nodes_[0]->submits(), 1);
}

TEST_F(GatewayFailover, DrainingGatewayRefusesNewRequestsAndFinishesOpenOnes) {
  Start(1, "0123456789");
  TestClient client(gateway_->port());
  StartHeld(client, 3, {{"prompt", "x"}, {"max_tokens", 10}, {"seed", 0}});
  EXPECT_FALSE(gateway_->Drain(std::chrono::milliseconds(1), [] { return false; }));  // not in that time
  EXPECT_FALSE(gateway_->Drain(std::chrono::minutes(1), [] { return true; }));        // told to stop
  EXPECT_EQ(Get("/health").status, 503);
  const auto refused = Post(kCompletions, {{"prompt", "x"}});
  EXPECT_EQ(refused.status, 503);
  EXPECT_THAT(refused.json()["error"]["message"].get<std::string>(), HasSubstr("draining"));
  Release();
  EXPECT_TRUE(gateway_->Drain(std::chrono::minutes(1), [] { return false; }));
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(JoinText(ReadEvents(client)), "0123456789");
}

TEST_F(GatewayFailover, SilenceEndsARequest) {
  options_.silence_max = std::chrono::milliseconds(100);
  Start(1);
  nodes_[0]->HoldAfter(0);
  const auto answer = Post(kCompletions, {{"prompt", "x"}});
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(answer.code(), "timeout");
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
}

TEST_F(GatewayFailover, ARequestsTimeoutEndsItAndTheNodeKnowsIt) {
  Start(1, "0123456789");
  nodes_[0]->HoldAfter(2);
  const auto answer = Post(kCompletions, {{"prompt", "x"}, {"max_tokens", 9}, {"timeout_s", 0.5}});
  EXPECT_EQ(answer.status, 504);
  EXPECT_EQ(answer.code(), "deadline_exceeded");
  EXPECT_GT(nodes_[0]->last_submit().deadline_ms(), 0u);
  EXPECT_LE(nodes_[0]->last_submit().deadline_ms(), 500u);
  TestClient client(gateway_->port());
  client.Request(
      "POST", kCompletions,
      json({{"prompt", "x"}, {"max_tokens", 9}, {"seed", 0}, {"timeout_s", 1}, {"stream", true}}).dump());
  EXPECT_EQ(client.ReadHead().status, 200);
  const auto events = ReadEvents(client);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events.back()["error"]["code"], "deadline_exceeded");
  EXPECT_TRUE(Eventually([this] { return Active() == 0; }));
  for (const char* bad : {"0", "-1", "86401", "1e40", "\"1\"", "[]"}) {
    const auto refused = Post(kCompletions, {{"prompt", "x"}, {"timeout_s", json::parse(bad)}});
    EXPECT_EQ(refused.status, 400) << bad;
    EXPECT_EQ(refused.json()["error"]["param"], "timeout_s") << bad;
  }
}

TEST_F(GatewayFailover, ARequestsTimeoutEndsItWhileItWaitsForANode) {
  options_.unready_wait = std::chrono::minutes(1);
  Start(1);
  nodes_[0]->SetFrozen(true);
  ASSERT_TRUE(Eventually([this] { return !gateway_->not_ready_reason().empty(); }));
  const auto answer = Post(kCompletions, {{"prompt", "x"}, {"timeout_s", 0.1}});
  EXPECT_EQ(answer.status, 504);
  EXPECT_EQ(answer.code(), "deadline_exceeded");
}

class GatewayGrpc : public GatewayFixture {
 protected:
  struct Result {
    grpc::Status status;
    std::string text;
    std::vector<uint32_t> ids;
    int logprobs = 0, prompt_logprobs = 0;
    inference::v1::GenerateResponse last;
  };
  Result Call(const inference::v1::GenerateRequest& request, const std::string& key = "") {
    const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(gateway_->grpc_port()),
                                             grpc::InsecureChannelCredentials());
    const auto stub = inference::v1::Inference::NewStub(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    const auto reader = stub->Generate(&context, request);
    Result result;
    inference::v1::GenerateResponse response;
    while (reader->Read(&response)) {
      result.text += response.text();
      result.ids.insert(result.ids.end(), response.token_ids().begin(), response.token_ids().end());
      result.logprobs += response.logprobs_size();
      result.prompt_logprobs += response.prompt_logprobs_size();
      result.last = response;
    }
    result.status = reader->Finish();
    return result;
  }
};

TEST_F(GatewayGrpc, GeneratesWhatHttpDoes) {
  Start(1, "héllo STOP ");
  inference::v1::GenerateRequest request;
  request.set_text("Hi");
  request.mutable_sampling()->set_max_tokens(6);
  request.mutable_sampling()->set_want_logprobs(true);
  request.mutable_sampling()->set_want_prompt_logprobs(true);
  Result result = Call(request);
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.text, "héllo");
  EXPECT_EQ(result.ids.size(), 6u);
  EXPECT_EQ(result.logprobs, 6);
  EXPECT_EQ(result.prompt_logprobs, 2);
  EXPECT_EQ(result.last.finish_reason(), inference::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(result.last.prompt_tokens(), 3u);
  EXPECT_EQ(result.last.completion_tokens(), 6u);
  EXPECT_GT(nodes_[0]->last_submit().deadline_ms(), 1000u);    // the call's, of 30 s
  EXPECT_LE(nodes_[0]->last_submit().deadline_ms(), 30'100u);  // gRPC rounds up to tenths
  request.mutable_sampling()->set_max_tokens(100);
  request.add_stop("STOP");
  result = Call(request);
  EXPECT_EQ(result.text, "héllo ");
  EXPECT_EQ(result.last.finish_reason(), inference::v1::FINISH_REASON_STOP);
  EXPECT_TRUE(Eventually([this] { return Active() == 0 && gateway_->active_sequences() == 0; }));
}

TEST_F(GatewayGrpc, ErrorsAreStatuses) {
  const std::string path = folder_ + "/keys";
  std::ofstream(path) << "secret\n";
  options_.api_key_file = path;
  Start();
  inference::v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(5);
  request.mutable_sampling()->set_max_tokens(2);
  EXPECT_EQ(Call(request).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Call(request, "secret").status.ok());
  request.set_model("other");
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::NOT_FOUND);
  request.set_model("small");
  request.mutable_sampling()->set_temperature(3);
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_token_ids()->add_ids(300);
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.clear_prompt();
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.mutable_token_ids()->add_ids(5);
  nodes_[0]->RefuseWith(grpc::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  SendView(false);
  EXPECT_EQ(Call(request, "secret").status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(GatewayGrpc, CallerThatLeavesCancelsItsWork) {
  Start();
  nodes_[0]->HoldAfter(2);
  const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(gateway_->grpc_port()),
                                           grpc::InsecureChannelCredentials());
  const auto stub = inference::v1::Inference::NewStub(channel);
  grpc::ClientContext context;
  inference::v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(5);
  request.mutable_sampling()->set_max_tokens(20);
  const auto reader = stub->Generate(&context, request);
  inference::v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(Active(), 1);
  context.TryCancel();
  EXPECT_TRUE(Eventually([this] { return Active() == 0 && gateway_->active_sequences() == 0; }));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

}  // namespace
}  // namespace minke::gateway
