#include "services/gateway/openai/handler.h"

#include <utility>

#include "libs/base/strings.h"
#include "libs/telemetry/page.h"
#include "services/gateway/openai/json_writer.h"

namespace minke::gateway {
namespace {

constexpr std::string_view kModelsPath = "/v1/models";

std::unique_ptr<Exchange> Error(int status, const std::string& message, const std::string& code) {
  return std::make_unique<ImmediateExchange>(ApiError{status, message, "", code, 0});
}

std::unique_ptr<Exchange> Json(int status, std::string body) {
  return std::make_unique<ImmediateExchange>(HttpHead{.status = status}, std::move(body));
}

std::unique_ptr<Exchange> Refused(const KeyRefusal& refusal) {
  return std::make_unique<ImmediateExchange>(
      ApiError{429, refusal.message, "", refusal.code, refusal.retry_after_s});
}

// Null if the account may go on: then the body is worth reading.
std::unique_ptr<Exchange> RefuseBy(KeyAccount& account) {
  const auto peeked = account.Peek(KeyAccount::Clock::now());
  const auto* refusal = std::get_if<KeyRefusal>(&peeked);
  return refusal == nullptr ? nullptr : Refused(*refusal);
}

bool IsGenerate(const std::string& path) {
  return path == "/v1/completions" || path == "/v1/chat/completions";
}

// Answered without a key.
bool IsOpen(const std::string& path) { return path == "/health" || path == "/version" || path == "/metrics"; }

// What a path takes; empty: there is no such path.
const char* AllowedMethods(const std::string& path) {
  if (IsGenerate(path)) return "POST, OPTIONS";
  if (IsOpen(path) || path == kModelsPath ||
      (path.starts_with(StrCat(kModelsPath, "/")) && path.size() > kModelsPath.size() + 1)) {
    return "GET, HEAD, OPTIONS";
  }
  return "";
}

}  // namespace

std::unique_ptr<Exchange> OpenAiHandler::HandleHead(const HttpRequest& head) {
  options_.context.counters->http_requests.fetch_add(1);
  const std::string_view allowed = AllowedMethods(head.path);
  if (allowed.empty())
    return Error(404, StrCat("no such path: ", head.method, " ", head.path.substr(0, 200)), "not_found");
  if (head.method == "OPTIONS") {
    return std::make_unique<ImmediateExchange>(HttpHead{.status = 204, .allow = std::string(allowed)}, "");
  }
  std::shared_ptr<KeyAccount> account;
  if (!IsOpen(head.path) && options_.keys != nullptr &&
      (account = options_.keys->Find(head.authorization)) == nullptr) {
    return Error(401,
                 head.authorization.empty() ? "an API key is needed: send \"Authorization: Bearer KEY\""
                                            : "the API key is not valid",
                 "invalid_api_key");
  }
  if (IsGenerate(head.path) && head.method == "POST") {
    const std::string reason = options_.refusal_reason();
    if (reason.empty()) return account == nullptr ? nullptr : RefuseBy(*account);
    return std::make_unique<ImmediateExchange>(
        ApiError{503, StrCat("not ready: ", reason), "", "not_ready", 1});
  }
  if (!IsGenerate(head.path) && (head.method == "GET" || head.method == "HEAD")) return Get(head);
  const ApiError error{405, StrCat(head.path, " takes ", allowed, ", not ", head.method.substr(0, 40)), "",
                       "method_not_allowed", 0};
  HttpHead answer = ErrorHead(error);
  answer.allow = std::string(allowed);
  return std::make_unique<ImmediateExchange>(std::move(answer), ErrorBody(error));
}

std::unique_ptr<Exchange> OpenAiHandler::Get(const HttpRequest& head) const {
  if (head.path == "/health") return Health();
  if (head.path == "/version") return Json(200, "{\"version\":\"" MK_VERSION "\"}");
  if (head.path == "/metrics") {
    return std::make_unique<ImmediateExchange>(HttpHead{.content_type = telemetry::kTextContentType},
                                               options_.metrics());
  }
  return Models(head.path);
}

void OpenAiHandler::OnAnswer(const HttpRequest& request, int status) {
  options_.context.counters->responses.Count(IsGenerate(request.path), status);
}

std::unique_ptr<Exchange> OpenAiHandler::Health() const {
  const std::string reason = options_.not_ready_reason();
  if (reason.empty()) return Json(200, "{\"status\":\"ok\"}");
  const ApiError error{503, StrCat("not ready: ", reason), "", "not_ready", 1};
  std::string body;
  JsonWriter json(&body);
  json.BeginObject();
  json.Key("status").String("not_ready");
  json.Key("reason").String(reason);
  json.EndObject();
  // Both: the two fields for probes, the error object for clients.
  body.pop_back();
  body += ",";
  body += ErrorBody(error).substr(1);
  return std::make_unique<ImmediateExchange>(ErrorHead(error), std::move(body));
}

std::unique_ptr<Exchange> OpenAiHandler::Models(const std::string& path) const {
  const GatewayModel& model = *options_.context.model;
  const auto write_model = [&](JsonWriter& json) {
    json.BeginObject();
    json.Key("id").String(model.name);
    json.Key("object").String("model");
    json.Key("created").Int(options_.started_at);
    json.Key("owned_by").String("minke");
    json.Key("max_model_len").Unsigned(model.context_length);
    json.EndObject();
  };
  std::string body;
  JsonWriter json(&body);
  if (path == kModelsPath) {
    json.BeginObject();
    json.Key("object").String("list");
    json.Key("data").BeginArray();
    write_model(json);
    json.EndArray();
    json.EndObject();
    return Json(200, std::move(body));
  }
  const std::string name = path.substr(kModelsPath.size() + 1);
  if (name != model.name) {
    return std::make_unique<ImmediateExchange>(
        ApiError{404, StrCat("the model \"", name.substr(0, 200), "\" does not exist"), "model",
                 "model_not_found", 0});
  }
  write_model(json);
  return Json(200, std::move(body));
}

std::unique_ptr<Exchange> OpenAiHandler::Handle(HttpRequest request, std::function<void()> wake) {
  const Endpoint endpoint = request.path == "/v1/completions" ? Endpoint::kCompletions : Endpoint::kChat;
  auto parsed = ParseRequest(endpoint, request.body, *options_.context.model);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return std::make_unique<ImmediateExchange>(*error);
  GenerateRequest& generate = std::get<GenerateRequest>(parsed);
  Admission::Permit permit = options_.admission->TryAcquire(static_cast<int64_t>(generate.num_sequences()));
  if (!permit) {
    options_.context.counters->generations_refused.fetch_add(1);
    return std::make_unique<ImmediateExchange>(
        ApiError{429,
                 StrCat("the server is full: ", options_.admission->active(), " of ",
                        options_.admission->sequences_max(), " sequences are running; try again later"),
                 "", "overloaded", 1});
  }
  KeyAccount::Permit key_permit;
  if (options_.keys != nullptr) {
    const std::shared_ptr<KeyAccount> account = options_.keys->Find(request.authorization);
    if (account == nullptr) return Error(401, "the API key is not valid any more", "invalid_api_key");
    auto begun = account->Begin(static_cast<int64_t>(generate.num_sequences()), generate.prompt_tokens(),
                                KeyAccount::Clock::now());
    if (const auto* refusal = std::get_if<KeyRefusal>(&begun)) return Refused(*refusal);
    key_permit = std::get<KeyAccount::Permit>(std::move(begun));
  }
  return std::make_unique<GenerateExchange>(options_.context, std::move(generate), std::move(permit),
                                            std::move(key_permit), request, std::move(wake));
}

std::unique_ptr<Exchange> OpenAiHandler::BodyTooLarge(int64_t body_bytes_max) {
  return Error(413, StrCat("the body: expected at most ", body_bytes_max, " bytes"), "request_too_large");
}

std::unique_ptr<Exchange> OpenAiHandler::Refuse(int status, const std::string& reason) {
  return Error(status, reason,
               status == 503   ? "overloaded"
               : status >= 500 ? "internal_error"
                               : "bad_request");
}

}  // namespace minke::gateway
