// A gateway on real sockets in front of fake attention nodes.
#pragma once

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "libs/tokenizer/byte_level_files.h"
#include "libs/tokenizer/tokenizer.h"
#include "proto/cluster/cluster.pb.h"
#include "services/gateway/gateway.h"
#include "services/gateway/testing/fake_attention.h"
#include "services/gateway/testing/http_client.h"

namespace minke::gateway {

// Waits for what other threads do; false after 30 s.
inline bool Eventually(const std::function<bool()>& holds) {
  for (int i = 0; i < 30'000; ++i) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// gRPC 1.51 can free the queue of its callback threads twice when the last channel or server that uses it
// goes (AddressSanitizer shows it, all frames gRPC's). A program does that once, at its end; these tests do
// it all the time. A channel that never goes keeps the queue.
inline void KeepCallbackQueue() {
  struct Kept {
    std::shared_ptr<grpc::Channel> channel =
        grpc::CreateChannel("127.0.0.1:1", grpc::InsecureChannelCredentials());
    std::unique_ptr<inference::v1::Attention::Stub> stub = inference::v1::Attention::NewStub(channel);
    grpc::ClientContext context;
    inference::v1::GetStatusRequest request;
    inference::v1::GetStatusResponse response;
  };
  static Kept* const kept = [] {
    auto* made = new Kept;
    made->stub->async()->GetStatus(&made->context, &made->request, &made->response,
                                   [](const grpc::Status&) {});
    return made;
  }();
  (void)kept;
}

class GatewayFixture : public ::testing::Test {
 protected:
  GatewayFixture() {
    KeepCallbackQueue();
    std::string pattern = (std::filesystem::temp_directory_path() / "minke_gateway_XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
    options_.http.listen = "127.0.0.1:0";
    options_.http.inline_body_bytes = 256;  // both ways of handling a body are used
  }
  ~GatewayFixture() override {
    gateway_.reset();
    nodes_.clear();
    std::filesystem::remove_all(folder_);
  }

  GatewayModel Model() {
    EXPECT_TRUE(
        tokenizer::WriteByteLevelTokenizer(folder_, {.vocab_size = 300, .bos_id = 0, .eos_id = 1}).ok());
    GatewayModel model;
    model.name = "small";
    model.tokenizer = *tokenizer::Tokenizer::Load(folder_);
    model.chat_template = tokenizer::ChatTemplate::kV2Chat;
    model.vocab_size = 300;
    model.context_length = 50'000;
    model.eos_token_ids = {1};
    return model;
  }
  // A gateway and `nodes` fakes, ready.
  void Start(int nodes = 1, std::string script = "abc") {
    auto gateway = Gateway::Create(options_, Model());
    ASSERT_TRUE(gateway.ok()) << gateway.status();
    gateway_ = *std::move(gateway);
    for (int i = 0; i < nodes; ++i) {
      nodes_.push_back(std::make_unique<FakeAttention>());
      nodes_.back()->set_script(script);
    }
    SendView();
    ASSERT_TRUE(Eventually([this] { return gateway_->not_ready_reason().empty(); }))
        << gateway_->not_ready_reason();
  }
  // `draining`: index of a node that is; -1: none.
  void SendView(bool ready = true, int draining = -1) {
    cluster::v1::ClusterView view;
    view.set_ready(ready);
    if (!ready) view.set_not_ready_reason("layer 1 group 2 has no server");
    for (size_t i = 0; i < nodes_.size(); ++i) {
      cluster::v1::Member* member = view.add_members();
      member->set_node_id(i + 1);
      member->set_role(cluster::v1::ROLE_ATTENTION);
      member->set_rpc_address(nodes_[i]->address());
      member->set_ready(true);
      member->set_draining(static_cast<int>(i) == draining);
    }
    gateway_->UpdateView(view);
  }

  TestClient::Answer Post(const std::string& path, const nlohmann::json& body,
                          const std::string& headers = "") {
    TestClient client(gateway_->port());
    client.Request("POST", path, body.dump(), headers);
    return client.Read();
  }
  TestClient::Answer Get(const std::string& path, const std::string& headers = "") {
    TestClient client(gateway_->port());
    client.Request("GET", path, "", headers);
    return client.Read();
  }
  // All events of a stream; the last one is "[DONE]" or an error.
  std::vector<nlohmann::json> Stream(const std::string& path, nlohmann::json body) {
    body["stream"] = true;
    TestClient client(gateway_->port());
    client.Request("POST", path, body.dump());
    EXPECT_EQ(client.ReadHead().headers["content-type"], "text/event-stream; charset=utf-8");
    return ReadEvents(client);
  }
  static std::vector<nlohmann::json> ReadEvents(TestClient& client) {
    std::vector<nlohmann::json> events;
    while (auto data = client.ReadEvent()) {
      events.push_back(*data == "[DONE]" ? nlohmann::json("[DONE]") : nlohmann::json::parse(*data));
    }
    return events;
  }
  static std::string JoinText(const std::vector<nlohmann::json>& events) {
    std::string text;
    for (const nlohmann::json& event : events) {
      if (!event.is_object() || !event.contains("choices")) continue;
      for (const nlohmann::json& choice : event["choices"]) {
        text += choice.contains("delta") ? choice["delta"].value("content", "") : choice.value("text", "");
      }
    }
    return text;
  }
  int Active() const {
    int active = 0;
    for (const auto& node : nodes_) active += node->active();
    return active;
  }

  std::string folder_;
  GatewayOptions options_;
  std::vector<std::unique_ptr<FakeAttention>> nodes_;
  std::unique_ptr<Gateway> gateway_;
};

}  // namespace minke::gateway
