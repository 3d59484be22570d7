// /metrics of a gateway on real sockets, in front of fake attention nodes.
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/gateway/testing/gateway_fixture.h"

namespace minke::gateway {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;

constexpr char kCompletions[] = "/v1/completions";

class GatewayMetrics : public GatewayFixture {
 protected:
  std::string Scrape() {
    const TestClient::Answer answer = Get("/metrics");
    EXPECT_EQ(answer.status, 200);
    return answer.body;
  }
  // The value of the series whose line begins so; -1: there is none.
  double Value(const std::string& series) {
    const std::string text = "\n" + Scrape();
    const size_t at = text.find("\n" + series + " ");
    return at == std::string::npos ? -1 : std::stod(text.substr(at + series.size() + 2));
  }
  double Ended(const std::string& reason) {
    return Value("minke:request_success_total{model_name=\"small\",finished_reason=\"" + reason + "\"}");
  }
};

TEST_F(GatewayMetrics, CountTokensTimesAndEnds) {
  Start();
  EXPECT_EQ(Ended("length"), 0);  // there before the first request
  EXPECT_EQ(Post(kCompletions, {{"prompt", "four"}, {"max_tokens", 5}}).status, 200);
  EXPECT_EQ(Ended("length"), 1);
  EXPECT_EQ(Value("minke:generation_tokens_total{model_name=\"small\"}"), 5);
  const double prompt = Value("minke:prompt_tokens_total{model_name=\"small\"}");
  EXPECT_GE(prompt, 4);
  EXPECT_EQ(Value("minke:request_prompt_tokens_sum{model_name=\"small\"}"), prompt);
  EXPECT_EQ(Value("minke:time_to_first_token_seconds_count{model_name=\"small\"}"), 1);
  EXPECT_EQ(Value("minke:inter_token_latency_seconds_count{model_name=\"small\"}"), 4);
  EXPECT_DOUBLE_EQ(Value("minke:request_queue_time_seconds_sum{model_name=\"small\"}"), kQueueUs * 1e-6);
  EXPECT_EQ(Value("minke:http_responses_total{endpoint=\"generate\",code=\"200\"}"), 1);
}

TEST_F(GatewayMetrics, AStopStringIsAStopAndNotAnAbort) {
  Start();
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}, {"max_tokens", 50}, {"seed", 0}, {"stop", "c"}}).status,
            200);
  EXPECT_EQ(Ended("stop"), 1);
  EXPECT_EQ(Ended("abort"), 0);
}

TEST_F(GatewayMetrics, AClientThatLeavesIsAnAbort) {
  Start();
  nodes_[0]->HoldAfter(1);
  {
    TestClient client(gateway_->port());
    client.Request("POST", kCompletions, json({{"prompt", "x"}, {"max_tokens", 5}, {"stream", true}}).dump());
    ASSERT_EQ(client.ReadHead().status, 200);
  }
  EXPECT_TRUE(Eventually([this] { return Ended("abort") == 1; }));
  EXPECT_EQ(Value("minke:requests_abandoned_total"), 1);
}

TEST_F(GatewayMetrics, ErrorsCountBeforeAndInsideAStream) {
  Start();
  nodes_[0]->RefuseWith(grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 503);
  EXPECT_EQ(Ended("error"), 1);
  EXPECT_EQ(Value("minke:http_responses_total{endpoint=\"generate\",code=\"503\"}"), 1);
  EXPECT_EQ(Value("minke:stream_errors_total"), 0);
  nodes_[0]->RefuseWith(grpc::StatusCode::OK);
  nodes_[0]->HoldAfter(1);
  TestClient client(gateway_->port());
  client.Request("POST", kCompletions, json({{"prompt", "x"}, {"max_tokens", 5}, {"stream", true}}).dump());
  ASSERT_EQ(client.ReadHead().status, 200);
  ASSERT_TRUE(client.ReadEvent().has_value());
  nodes_[0]->RefuseWith(grpc::StatusCode::INTERNAL);
  while (client.ReadEvent().has_value()) {
  }
  EXPECT_EQ(Value("minke:stream_errors_total"), 1);
  EXPECT_EQ(Ended("error"), 2);
}

TEST_F(GatewayMetrics, AreOpenWithoutAKey) {
  options_.api_key_file = folder_ + "/keys";
  std::ofstream(options_.api_key_file) << "secret\n";
  Start();
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}}).status, 401);
  EXPECT_EQ(Value("minke:http_responses_total{endpoint=\"generate\",code=\"401\"}"), 1);
  EXPECT_THAT(Get("/metrics").headers["content-type"], HasSubstr("version=0.0.4"));
  TestClient client(gateway_->port());
  client.Request("POST", "/metrics", "{}");
  EXPECT_EQ(client.Read().status, 405);
}

TEST_F(GatewayMetrics, VllmNamesAreOffByDefault) {
  Start();
  EXPECT_THAT(Scrape(), Not(HasSubstr("vllm:")));
}

TEST_F(GatewayMetrics, VllmNamesShowTheClusterAsOneEngine) {
  options_.vllm_names = true;
  Start(2);
  for (auto& node : nodes_) {
    inference::v1::GetStatusResponse status;
    status.set_running_sequences(2);
    status.set_waiting_sequences(1);
    status.set_cache_pages_total(100);
    status.set_cache_pages_used(25);
    status.set_preemptions(4);
    status.set_prefix_cache_queries(1000);
    status.set_prefix_cache_hits(10);
    node->SetStatus(status);
  }
  EXPECT_EQ(Post(kCompletions, {{"prompt", "x"}, {"max_tokens", 5}}).status, 200);
  const std::string labels = "{model_name=\"small\",engine=\"0\"}";
  EXPECT_TRUE(Eventually([&] { return Value("vllm:num_requests_running" + labels) == 4; }));
  EXPECT_EQ(Value("vllm:num_requests_waiting" + labels), 2);
  EXPECT_EQ(Value("vllm:kv_cache_usage_perc" + labels), 0.25);
  EXPECT_EQ(Value("vllm:num_preemptions_total" + labels), 8);
  EXPECT_EQ(Value("vllm:prefix_cache_queries_total" + labels), 2000);
  EXPECT_EQ(Value("vllm:prefix_cache_hits_total" + labels), 20);
  EXPECT_EQ(Value("vllm:generation_tokens_total" + labels), 5);
  EXPECT_EQ(Value("vllm:time_to_first_token_seconds_count" + labels), 1);
  // Nodes that leave take their gauges along, and leave their counts behind.
  gateway_->UpdateView(cluster::v1::ClusterView());
  EXPECT_TRUE(Eventually([&] { return Value("vllm:num_requests_running" + labels) == -1; }));
  EXPECT_EQ(Value("vllm:generation_tokens_total" + labels), 5);
}

}  // namespace
}  // namespace minke::gateway
