// The console's routes on real sockets: the page, the cluster's view and its stream, and what an operator may
// do, in front of a stand-in for `minke up`.
#include <grpcpp/grpcpp.h>

#include <thread>

#include "gmock/gmock.h"
#include "proto/cluster/operator.grpc.pb.h"
#include "services/gateway/cluster_view/cluster_feed.h"
#include "services/gateway/testing/gateway_fixture.h"

namespace minke::gateway {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Answers as `minke up` does.
class FakeOperator final : public cluster::v1::Operator::Service {
 public:
  explicit FakeOperator(const std::string& socket_path) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + socket_path, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeOperator() override { server_->Shutdown(); }

  grpc::Status Scale(grpc::ServerContext*, const cluster::v1::ScaleRequest* request,
                     cluster::v1::ScaleAnswer* answer) override {
    if (request->count() > 9) return {grpc::StatusCode::INVALID_ARGUMENT, "experts: expected at most 9"};
    if (request->count() == 9)
      return {grpc::StatusCode::FAILED_PRECONDITION, "the cluster is still starting"};
    scaled_ = *request;
    answer->set_before(2);
    answer->add_started()->set_name("expert 2");
    return grpc::Status::OK;
  }
  grpc::Status Drain(grpc::ServerContext*, const cluster::v1::DrainRequest* request,
                     cluster::v1::DrainAnswer* answer) override {
    drained_ = *request;
    answer->mutable_draining()->set_name("attention 0");
    return grpc::Status::OK;
  }
  grpc::Status Status(grpc::ServerContext*, const cluster::v1::StatusRequest*,
                      cluster::v1::StatusAnswer* answer) override {
    auto* child = answer->add_children();
    child->set_name("expert 0");
    child->set_role(cluster::v1::ROLE_EXPERT);
    child->set_state(cluster::v1::CHILD_STATE_RUNNING);
    return grpc::Status::OK;
  }

  cluster::v1::ScaleRequest scaled_;  // the last ones; read after the answer
  cluster::v1::DrainRequest drained_;

 private:
  std::unique_ptr<grpc::Server> server_;
};

constexpr char kToken[] = "authorization: Bearer op-token\r\n";
constexpr char kKey[] = "authorization: Bearer key-1\r\n";

class ConsoleTest : public GatewayFixture {
 protected:
  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ + "/" + name) << text;
    return folder_ + "/" + name;
  }
  void StartOperated() {
    options_.operator_socket = folder_ + "/operator.sock";
    options_.operator_token_file = Write("tokens", "# ours\nop-token\n");
    operator_ = std::make_unique<FakeOperator>(options_.operator_socket);
    Start();
  }
  std::unique_ptr<FakeOperator> operator_;
};

TEST_F(ConsoleTest, ThePageAndItsFilesAreServedWithAStrictPolicy) {
  Start();
  const auto page = Get("/");
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.headers.at("content-type"), "text/html; charset=utf-8");
  EXPECT_THAT(page.headers.at("content-security-policy"), HasSubstr("default-src 'none'; script-src 'self'"));
  EXPECT_THAT(page.headers.at("content-security-policy"), Not(HasSubstr("unsafe")));
  EXPECT_EQ(page.headers.at("x-content-type-options"), "nosniff");
  EXPECT_THAT(page.body, HasSubstr("src=\"/console/console.js\""));
  EXPECT_EQ(Get("/console/console.js").headers.at("content-type"), "text/javascript; charset=utf-8");
  EXPECT_EQ(Get("/console/console.css").headers.at("content-type"), "text/css; charset=utf-8");
  EXPECT_EQ(Get("/console/icon.svg").headers.at("content-type"), "image/svg+xml");
  EXPECT_EQ(Get("/console/other.js").status, 404);
  EXPECT_EQ(Post("/", {}).status, 405);
}

TEST_F(ConsoleTest, AFileThatHasNotChangedIsNotSentAgain) {
  Start();
  const auto first = Get("/console/console.js");
  const auto again = Get("/console/console.js", "if-none-match: " + first.headers.at("etag") + "\r\n");
  EXPECT_EQ(again.status, 304);
  EXPECT_EQ(again.body, "");
  EXPECT_FALSE(again.headers.contains("content-length"));
  EXPECT_EQ(Get("/console/console.js", "if-none-match: \"another\"\r\n").status, 200);
}

TEST_F(ConsoleTest, TheViewNeedsAKeyWhereTheApiDoes) {
  options_.api_key_file = Write("keys", "key-1\n");
  StartOperated();
  for (const std::string path : {"/cluster", "/cluster/events"}) {
    EXPECT_EQ(Get(path).status, 401) << path;
    EXPECT_EQ(Get(path).code(), "invalid_api_key");
    EXPECT_EQ(Get(path, "authorization: Bearer key-2\r\n").status, 401);
  }
  EXPECT_EQ(Get("/cluster", kKey).status, 200);
  EXPECT_EQ(Get("/cluster", kToken).status, 200);  // an operator sees the cluster too
  EXPECT_EQ(Get("/").status, 200);                 // the page asks for the key
  EXPECT_EQ(Get("/v1/models", kToken).status, 401);
}

TEST_F(ConsoleTest, TheViewShowsMembersAndTraffic) {
  Start(2);
  EXPECT_EQ(Post("/v1/completions", {{"prompt", "abc"}, {"max_tokens", 3}}).status, 200);
  const auto tokens = [&] {
    const auto series = Get("/cluster").json()["traffic"]["series"]["tokens"];
    int sum = 0;
    for (const auto& second : series) sum += second.get<int>();
    return sum;
  };
  EXPECT_TRUE(Eventually([&] { return tokens() == 3; }));
  const auto view = Get("/cluster").json();
  EXPECT_EQ(view["schema"], 1);
  EXPECT_EQ(view["ready"], true);
  EXPECT_EQ(view["operator"], false);
  EXPECT_EQ(view["model"]["name"], "small");
  EXPECT_EQ(view["pools"][1]["name"], "attention");
  EXPECT_EQ(view["pools"][1]["ready"], 2);
  EXPECT_GT(view["traffic"]["first_token_ms"]["p50"].get<double>(), 0);
  SendView(/*ready=*/false);
  EXPECT_TRUE(Eventually([&] { return Get("/cluster").json()["ready"] == false; }));
  EXPECT_EQ(Get("/cluster").json()["not_ready_reason"], "layer 1 group 2 has no server");
}

TEST_F(ConsoleTest, TheStreamTellsTheViewEverySecondAndEndsWithTheGateway) {
  Start();
  TestClient client(gateway_->port());
  client.Request("GET", "/cluster/events");
  EXPECT_EQ(client.ReadHead().headers["content-type"], "text/event-stream; charset=utf-8");
  const auto first = client.ReadEvent(), second = client.ReadEvent();
  ASSERT_TRUE(first && second);
  const int64_t apart = nlohmann::json::parse(*second)["time_ms"].get<int64_t>() -
                        nlohmann::json::parse(*first)["time_ms"].get<int64_t>();
  EXPECT_GE(apart, 700);
  EXPECT_LE(apart, 5000);
  const auto begin = std::chrono::steady_clock::now();
  gateway_->Shutdown(std::chrono::seconds(20));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  while (client.ReadEvent()) {
  }
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(ConsoleTest, ListenersAreBounded) {
  Start();
  std::vector<std::unique_ptr<TestClient>> clients;
  for (int i = 0; i < ClusterFeed::kListenersMax; ++i) {
    clients.push_back(std::make_unique<TestClient>(gateway_->port()));
    clients.back()->Request("GET", "/cluster/events");
    EXPECT_EQ(clients.back()->ReadHead().status, 200);
  }
  EXPECT_EQ(Get("/cluster/events").status, 429);
  EXPECT_EQ(Get("/cluster").status, 200);
  clients.pop_back();
  EXPECT_TRUE(Eventually([&] {
    TestClient client(gateway_->port());
    client.Request("GET", "/cluster/events");
    return client.ReadHead().status == 200;
  }));
}

TEST_F(ConsoleTest, WithoutAnOperatorThereIsNothingToCall) {
  Start();
  EXPECT_EQ(Post("/operator/scale", {{"pool", "experts"}, {"count", 3}}).status, 404);
  EXPECT_EQ(Post("/operator/scale", {}, kToken).code(), "no_operator");
  EXPECT_EQ(Get("/operator/status").status, 404);
  EXPECT_EQ(Get("/cluster").json()["operator"], false);
}

TEST_F(ConsoleTest, AWrongTokenOrNoneIsRefused) {
  StartOperated();
  EXPECT_EQ(Get("/cluster").json()["operator"], true);
  for (const std::string headers :
       {"", "authorization: Bearer op-toke\r\n", "authorization: Bearer op-token2\r\n",
        "authorization: op-token\r\n", kKey}) {
    for (const std::string path : {"/operator/scale", "/operator/drain"}) {
      const auto answer = Post(path, {{"pool", "experts"}, {"count", 3}}, headers);
      EXPECT_EQ(answer.status, 403) << headers;
      EXPECT_EQ(answer.code(), "invalid_operator_token");
    }
    EXPECT_EQ(Get("/operator/status", headers).status, 403);
  }
  EXPECT_EQ(operator_->scaled_.count(), 0u);
}

TEST_F(ConsoleTest, AnOperatorScales) {
  StartOperated();
  const auto answer = Post("/operator/scale", {{"pool", "experts"}, {"count", 3}}, kToken);
  EXPECT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(answer.json()["before"], 2);
  EXPECT_EQ(answer.json()["started"][0]["name"], "expert 2");
  EXPECT_EQ(operator_->scaled_.role(), cluster::v1::ROLE_EXPERT);
  EXPECT_EQ(operator_->scaled_.count(), 3u);
  EXPECT_THAT(Get("/cluster").body, HasSubstr("operator: experts 2 to 3"));
  EXPECT_EQ(Get("/operator/status", kToken).json()["children"][0]["pool"], "experts");
  EXPECT_EQ(Get("/operator/scale", kToken).status, 405);
}

TEST_F(ConsoleTest, WhatCannotBeHadIsOneClearError) {
  StartOperated();
  const auto refused = [&](const nlohmann::json& body) { return Post("/operator/scale", body, kToken); };
  EXPECT_EQ(refused({{"pool", "lords"}, {"count", 3}}).param(), "pool");
  EXPECT_EQ(refused({{"pool", "experts"}}).param(), "count");
  EXPECT_EQ(refused({{"pool", "experts"}, {"count", 0}}).param(), "count");
  EXPECT_EQ(refused({{"pool", "experts"}, {"count", "3"}}).param(), "count");
  EXPECT_EQ(refused(nlohmann::json::array()).status, 400);
  EXPECT_EQ(refused({{"pool", "experts"}, {"count", 10}}).status, 400);
  EXPECT_THAT(refused({{"pool", "experts"}, {"count", 10}}).body, HasSubstr("expected at most 9"));
  EXPECT_EQ(refused({{"pool", "experts"}, {"count", 9}}).status, 409);
  operator_.reset();
  EXPECT_EQ(refused({{"pool", "experts"}, {"count", 3}}).status, 503);
}

TEST_F(ConsoleTest, AnOperatorDrainsOneMemberOfThisHost) {
  StartOperated();
  cluster::v1::ClusterView view;
  const auto add = [&](uint64_t id, const std::string& address) {
    auto* member = view.add_members();
    member->set_node_id(id);
    member->set_role(cluster::v1::ROLE_ATTENTION);
    member->set_rpc_address(address);
    member->set_pid(4321);
    member->set_ready(true);
  };
  add(0xb1, "127.0.0.1:7000");
  add(0xb2, "10.0.0.9:7000");
  gateway_->UpdateView(view);
  const auto drain = [&](const std::string& node) {
    return Post("/operator/drain", {{"node", node}}, kToken);
  };
  EXPECT_EQ(drain("00000000000000b1").status, 200);
  EXPECT_EQ(operator_->drained_.pid(), 4321);
  EXPECT_EQ(operator_->drained_.role(), cluster::v1::ROLE_ATTENTION);
  EXPECT_EQ(drain("00000000000000b2").status, 409);
  EXPECT_THAT(drain("00000000000000b2").body, HasSubstr("not started by this host's minke up"));
  EXPECT_EQ(drain("00000000000000b3").status, 404);
  EXPECT_EQ(drain("b1").param(), "node");
  EXPECT_EQ(drain("").param(), "node");
}

TEST_F(ConsoleTest, OperatorFlagsComeInPairs) {
  options_.operator_socket = folder_ + "/operator.sock";
  EXPECT_THAT(Gateway::Create(options_, Model()).status().message(),
              HasSubstr("found only --operator-socket"));
  options_.operator_token_file = folder_ + "/none";
  EXPECT_THAT(Gateway::Create(options_, Model()).status().message(),
              HasSubstr("expected a file of operator tokens"));
  options_.operator_token_file = Write("tokens", "# none\n");
  EXPECT_THAT(Gateway::Create(options_, Model()).status().message(),
              HasSubstr("expected one operator token per line"));
}

}  // namespace
}  // namespace minke::gateway
