#include "services/gateway/console/console_handler.h"

#include <algorithm>
#include <utility>

#include "libs/base/strings.h"
#include "services/gateway/console/assets.h"
#include "services/gateway/console/operator_routes.h"
#include "services/gateway/openai/generate_exchange.h"

namespace minke::gateway {
namespace {

// The page may load its own files and talk to its own gateway, and nothing else; nobody may frame it.
constexpr char kContentPolicy[] =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

enum class Route { kOther, kAsset, kView, kEvents, kOperatorCall, kOperatorStatus };

const Asset* FindAsset(const std::string& path) {
  const auto assets = Assets();
  const auto it =
      std::find_if(assets.begin(), assets.end(), [&](const Asset& asset) { return asset.path == path; });
  return it == assets.end() ? nullptr : &*it;
}

Route RouteOf(const std::string& path) {
  if (path == "/cluster") return Route::kView;
  if (path == "/cluster/events") return Route::kEvents;
  if (path == "/operator/scale" || path == "/operator/drain") return Route::kOperatorCall;
  if (path == "/operator/status") return Route::kOperatorStatus;
  return FindAsset(path) == nullptr ? Route::kOther : Route::kAsset;
}

std::unique_ptr<Exchange> Refusal(int status, const std::string& message, const std::string& code) {
  return std::make_unique<ImmediateExchange>(ApiError{status, message, "", code, 0});
}

std::unique_ptr<Exchange> Serve(const Asset& asset, const HttpRequest& head) {
  HttpHead answer{.content_type = std::string(asset.content_type)};
  answer.fields = {
      {"etag", std::string(asset.etag)},
      {"cache-control", "no-cache"},  // looked at again each time, sent again when it has changed
      {"content-security-policy", kContentPolicy},
      {"x-content-type-options", "nosniff"},
      {"referrer-policy", "no-referrer"}};
  if (head.if_none_match.find(asset.etag) != std::string::npos) {
    answer.status = 304;
    return std::make_unique<ImmediateExchange>(std::move(answer), "");
  }
  return std::make_unique<ImmediateExchange>(std::move(answer), std::string(asset.bytes));
}

}  // namespace

std::unique_ptr<Exchange> ConsoleHandler::HandleHead(const HttpRequest& head) {
  const Route route = RouteOf(head.path);
  if (route == Route::kOther) return options_.next->HandleHead(head);
  if (route == Route::kOperatorCall || route == Route::kOperatorStatus) {
    if (auto refusal = RefuseOperator(head)) return refusal;
  }
  const bool post = route == Route::kOperatorCall;
  const bool fits = post ? head.method == "POST" : head.method == "GET" || head.method == "HEAD";
  if (!fits) {
    const std::string allowed = post ? "POST" : "GET, HEAD";
    const ApiError error{405, StrCat(head.path, " takes ", allowed, ", not ", head.method.substr(0, 40)), "",
                         "method_not_allowed", 0};
    HttpHead answer = ErrorHead(error);
    answer.allow = allowed;
    return std::make_unique<ImmediateExchange>(std::move(answer), ErrorBody(error));
  }
  switch (route) {
    case Route::kAsset:
      return Serve(*FindAsset(head.path), head);
    case Route::kView:
    case Route::kEvents:
      return View(head);
    default:
      return nullptr;  // Handle makes the call, as it is given a way to be woken
  }
}

std::unique_ptr<Exchange> ConsoleHandler::View(const HttpRequest& head) const {
  if (!Allows(options_.keys.get(), head.authorization) &&
      (options_.operator_tokens == nullptr || !Allows(options_.operator_tokens.get(), head.authorization))) {
    return Refusal(401,
                   head.authorization.empty() ? "an API key is needed: send \"Authorization: Bearer KEY\""
                                              : "the API key is not valid",
                   "invalid_api_key");
  }
  if (head.path == "/cluster") {
    HttpHead answer;
    answer.fields = {{"cache-control", "no-store"}};
    return std::make_unique<ImmediateExchange>(std::move(answer), *options_.feed->Latest());
  }
  if (head.method == "HEAD") {
    return std::make_unique<ImmediateExchange>(HttpHead{.content_type = "text/event-stream; charset=utf-8"},
                                               "");
  }
  auto stream = ClusterFeed::Listen(options_.feed);
  if (stream != nullptr) return stream;
  return std::make_unique<ImmediateExchange>(
      ApiError{429, StrCat("at most ", ClusterFeed::kListenersMax, " may listen to the cluster at once"), "",
               "overloaded", 1});
}

std::unique_ptr<Exchange> ConsoleHandler::RefuseOperator(const HttpRequest& head) const {
  if (options_.operator_client == nullptr)
    return Refusal(404, "this gateway has no operator: minke up --operator-token-file gives it one",
                   "no_operator");
  if (Allows(options_.operator_tokens.get(), head.authorization)) return nullptr;
  return Refusal(403,
                 head.authorization.empty()
                     ? "an operator token is needed: send \"Authorization: Bearer TOKEN\""
                     : "the operator token is not valid",
                 "invalid_operator_token");
}

std::unique_ptr<Exchange> ConsoleHandler::Handle(HttpRequest request, std::function<void()> wake) {
  if (request.path == "/operator/scale")
    return ScaleRoute(request.body, *options_.operator_client, options_.monitor, std::move(wake));
  if (request.path == "/operator/drain")
    return DrainRoute(request.body, *options_.operator_client, options_.monitor, std::move(wake));
  if (request.path == "/operator/status") return StatusRoute(*options_.operator_client, std::move(wake));
  return options_.next->Handle(std::move(request), std::move(wake));
}

}  // namespace minke::gateway
