#include "services/gateway/console/operator_routes.h"

#include <charconv>
#include <chrono>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"
#include "services/gateway/openai/error.h"
#include "services/gateway/openai/generate_exchange.h"
#include "services/gateway/openai/json_writer.h"
#include "services/gateway/openai/request_fields.h"

namespace minke::gateway {
namespace {

using namespace cluster::v1;  // NOLINT: enumerators of Role and ChildState

constexpr int64_t kCountMax = 4096;

std::unique_ptr<Exchange> Error(ApiError error) { return std::make_unique<ImmediateExchange>(error); }

ApiError OperatorError(const absl::Status& status) {
  const std::string message(StdView(status.message()));
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return {400, message, "", "cannot_be_had", 0};
    case absl::StatusCode::kNotFound:
      return {404, message, "", "not_found", 0};
    case absl::StatusCode::kFailedPrecondition:
      return {409, message, "", "not_now", 0};
    case absl::StatusCode::kUnimplemented:
      return {501, message, "", "not_implemented", 0};
    default:
      return {503, StrCat("minke up does not answer: ", message), "", "unavailable", 1};
  }
}

// Between the call's thread and the one that answers.
struct Mailbox {
  std::mutex mutex;
  std::optional<Exchange::Output> output;  // guarded by mutex
};

class WaitingExchange final : public Exchange {
 public:
  explicit WaitingExchange(std::shared_ptr<Mailbox> mailbox) : mailbox_(std::move(mailbox)) {}
  void Poll(Output* out) override {
    const std::lock_guard lock(mailbox_->mutex);
    if (mailbox_->output) *out = *std::move(mailbox_->output);
  }
  // The call has a deadline of its own.
  std::chrono::steady_clock::time_point deadline() const override {
    return std::chrono::steady_clock::now() + std::chrono::seconds(1);
  }

 private:
  const std::shared_ptr<Mailbox> mailbox_;  // shared with the call
};

// What a call's Done is: turns the answer into JSON and wakes the exchange.
template <typename Answer, typename Write>
OperatorClient::Done<Answer> Deliver(std::shared_ptr<Mailbox> mailbox, std::function<void()> wake,
                                     Write write) {
  return [mailbox = std::move(mailbox), wake = std::move(wake), write](absl::StatusOr<Answer> answer) {
    Exchange::Output output{.done = true};
    if (answer.ok()) {
      output.head = HttpHead{};
      JsonWriter json(&output.body);
      write(*answer, json);
    } else {
      const ApiError error = OperatorError(answer.status());
      output.head = ErrorHead(error);
      output.body = ErrorBody(error);
    }
    {
      const std::lock_guard lock(mailbox->mutex);
      mailbox->output = std::move(output);
    }
    wake();
  };
}

const char* StateName(ChildState state) {
  switch (state) {
    case CHILD_STATE_STARTING:
      return "starting";
    case CHILD_STATE_RUNNING:
      return "running";
    case CHILD_STATE_DRAINING:
      return "draining";
    case CHILD_STATE_RESTARTING:
      return "restarting";
    case CHILD_STATE_ENDED:
      return "ended";
    default:
      return "unknown";
  }
}

const char* PoolName(Role role) {
  switch (role) {
    case ROLE_EXPERT:
      return "experts";
    case ROLE_ATTENTION:
      return "attention";
    case ROLE_ROUTER:
      return "routers";
    case ROLE_GATEWAY:
      return "gateways";
    default:
      return "etcd";
  }
}

void WriteChild(const cluster::v1::Child& child, JsonWriter& json) {
  json.BeginObject();
  json.Key("name").String(child.name());
  json.Key("pool").String(PoolName(child.role()));
  json.Key("pid").Int(child.pid());
  json.Key("state").String(StateName(child.state()));
  json.Key("restarts").Unsigned(child.restarts());
  json.EndObject();
}

template <typename Children>
void WriteChildren(const char* key, const Children& children, JsonWriter& json) {
  json.Key(key).BeginArray();
  for (const cluster::v1::Child& child : children) WriteChild(child, json);
  json.EndArray();
}

std::optional<Role> ParsePool(const std::string& name) {
  if (name == "experts") return ROLE_EXPERT;
  if (name == "attention") return ROLE_ATTENTION;
  if (name == "routers") return ROLE_ROUTER;
  return std::nullopt;
}

// Only what runs on this host can be a child of its `minke up`: elsewhere the same pid is another process.
bool OnThisHost(const std::string& address) {
  return address.starts_with("127.") || address.starts_with("[::1]") || address.starts_with("localhost");
}

}  // namespace

std::unique_ptr<Exchange> ScaleRoute(const std::string& body, OperatorClient& client,
                                     std::shared_ptr<ClusterMonitor> monitor, std::function<void()> wake) {
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Error(BadField("", "the body: expected a JSON object"));
  RequestFields fields(json);
  std::string pool;
  std::optional<int64_t> count;
  fields.String("pool", &pool);
  fields.Integer("count", &count);
  if (fields.failed()) return Error(*fields.error());
  const std::optional<Role> role = ParsePool(pool);
  if (!role)
    return Error(BadField(
        "pool", StrCat("expected experts, attention or routers, found \"", pool.substr(0, 40), "\"")));
  if (!count || *count < 1 || *count > kCountMax)
    return Error(
        BadField("count", StrCat("expected 1 to ", kCountMax, ", found ", count ? StrCat(*count) : "none")));
  const auto mailbox = std::make_shared<Mailbox>();
  client.Scale(*role, static_cast<uint32_t>(*count),
               Deliver<ScaleAnswer>(mailbox, std::move(wake),
                                    [monitor, pool, count](const ScaleAnswer& answer, JsonWriter& out) {
                                      const std::string what =
                                          StrCat("operator: ", pool, " ", answer.before(), " to ", *count);
                                      log::Info("gateway/console", what);
                                      monitor->NoteOperator(what, absl::Now());
                                      out.BeginObject();
                                      out.Key("before").Unsigned(answer.before());
                                      WriteChildren("started", answer.started(), out);
                                      WriteChildren("draining", answer.draining(), out);
                                      out.EndObject();
                                    }));
  return std::make_unique<WaitingExchange>(mailbox);
}

std::unique_ptr<Exchange> DrainRoute(const std::string& body, OperatorClient& client,
                                     std::shared_ptr<ClusterMonitor> monitor, std::function<void()> wake) {
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Error(BadField("", "the body: expected a JSON object"));
  RequestFields fields(json);
  std::string node;
  fields.String("node", &node);
  if (fields.failed()) return Error(*fields.error());
  NodeId id;
  const auto [end, error] = std::from_chars(node.data(), node.data() + node.size(), id.value, 16);
  if (error != std::errc() || end != node.data() + node.size() || node.size() != 16)
    return Error(BadField(
        "node", StrCat("expected a member's id, 16 hex digits, found \"", node.substr(0, 40), "\"")));
  std::optional<MemberSnapshot> member;
  ClusterSnapshot snapshot = monitor->Snapshot(absl::Now());
  for (MemberSnapshot& candidate : snapshot.members) {
    if (candidate.id == id) member = std::move(candidate);
  }
  if (!member)
    return Error({404, StrCat("node ", node, " is no member of the cluster"), "node", "not_found", 0});
  if (member->pid == 0 || !OnThisHost(member->address)) {
    return Error({409,
                  StrCat("node ", node, " at ", member->address, " was not started by this host's minke up"),
                  "node", "not_here", 0});
  }
  const auto mailbox = std::make_shared<Mailbox>();
  client.Drain(
      member->role, static_cast<int32_t>(member->pid),
      Deliver<DrainAnswer>(mailbox, std::move(wake), [monitor](const DrainAnswer& answer, JsonWriter& out) {
        const std::string what = StrCat("operator: drain ", answer.draining().name());
        log::Info("gateway/console", what);
        monitor->NoteOperator(what, absl::Now());
        out.BeginObject();
        out.Key("draining");
        WriteChild(answer.draining(), out);
        out.EndObject();
      }));
  return std::make_unique<WaitingExchange>(mailbox);
}

std::unique_ptr<Exchange> StatusRoute(OperatorClient& client, std::function<void()> wake) {
  const auto mailbox = std::make_shared<Mailbox>();
  client.Status(
      Deliver<StatusAnswer>(mailbox, std::move(wake), [](const StatusAnswer& answer, JsonWriter& out) {
        out.BeginObject();
        WriteChildren("children", answer.children(), out);
        out.EndObject();
      }));
  return std::make_unique<WaitingExchange>(mailbox);
}

}  // namespace minke::gateway
