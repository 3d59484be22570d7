// The routes that are for people: the console's page, the cluster's view, and what an operator may do. All
// others are the next handler's. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "libs/http/exchange.h"
#include "services/gateway/cluster_view/cluster_feed.h"
#include "services/gateway/cluster_view/cluster_monitor.h"
#include "services/gateway/keys/api_keys.h"
#include "services/gateway/operator_client/operator_client.h"

namespace minke::gateway {

class ConsoleHandler final : public HttpHandler {
 public:
  struct Options {
    HttpHandler* next = nullptr;  // borrowed
    // Shared with the other edges; the API's open the view too. Null: everybody may see it; nobody may
    // operate.
    std::shared_ptr<ApiKeys> keys, operator_tokens;
    std::shared_ptr<OperatorClient>
        operator_client;                      // shared with calls under way; null: nobody may scale or drain
    std::shared_ptr<ClusterFeed> feed;        // shared with the streams
    std::shared_ptr<ClusterMonitor> monitor;  // shared with calls under way
  };
  explicit ConsoleHandler(Options options) : options_(std::move(options)) {}

  std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) override;
  std::unique_ptr<Exchange> Handle(HttpRequest request, std::function<void()> wake) override;
  std::unique_ptr<Exchange> BodyTooLarge(int64_t body_bytes_max) override {
    return options_.next->BodyTooLarge(body_bytes_max);
  }
  std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) override {
    return options_.next->Refuse(status, reason);
  }
  void OnAnswer(const HttpRequest& request, int status) override { options_.next->OnAnswer(request, status); }

 private:
  std::unique_ptr<Exchange> View(const HttpRequest& head) const;
  // Why this caller may not operate the cluster; nullptr: it may.
  std::unique_ptr<Exchange> RefuseOperator(const HttpRequest& head) const;

  const Options options_;
};

}  // namespace minke::gateway
