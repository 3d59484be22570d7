// The routes of the HTTP API: who may call, what is ready, which request goes where. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "libs/http/exchange.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/keys/api_keys.h"
#include "services/gateway/openai/generate_exchange.h"

namespace minke::gateway {

class OpenAiHandler final : public HttpHandler {
 public:
  struct Options {
    GenerateContext context;
    Admission* admission = nullptr;
    std::shared_ptr<ApiKeys> keys;                  // shared with the other edges; null: everybody may call
    std::function<std::string()> not_ready_reason;  // what /health says; empty: ready
    std::function<std::string()> refusal_reason;    // why a new request is not taken; empty: it is
    std::function<std::string()> metrics;           // what /metrics says
    int64_t started_at = 0;                         // Unix seconds, the model's "created"
  };
  explicit OpenAiHandler(Options options) : options_(std::move(options)) {}

  std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) override;
  std::unique_ptr<Exchange> Handle(HttpRequest request, std::function<void()> wake) override;
  std::unique_ptr<Exchange> BodyTooLarge(int64_t body_bytes_max) override;
  std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) override;
  void OnAnswer(const HttpRequest& request, int status) override;

 private:
  std::unique_ptr<Exchange> Health() const;
  std::unique_ptr<Exchange> Models(const std::string& path) const;
  std::unique_ptr<Exchange> Get(const HttpRequest& head) const;

  const Options options_;
};

}  // namespace minke::gateway
