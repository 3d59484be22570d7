#include <algorithm>
#include <array>
#include <cmath>

#include "services/gateway/cluster_view/snapshot.h"
#include "services/gateway/openai/json_writer.h"

namespace minke::gateway {
namespace {

using namespace cluster::v1;  // NOLINT: enumerators of Role

constexpr int64_t kSchema = 1;
constexpr size_t kHeatServersMax = 64;

struct Pool {
  Role role;
  const char* role_name;
  const char* name;  // as `minke scale` has it
};
constexpr std::array<Pool, 4> kPools = {{{ROLE_GATEWAY, "gateway", "gateways"},
                                         {ROLE_ATTENTION, "attention", "attention"},
                                         {ROLE_ROUTER, "router", "routers"},
                                         {ROLE_EXPERT, "expert", "experts"}}};

// Nobody reads more digits, and a heat map has thousands of numbers.
float Rounded(double value) { return static_cast<float>(std::round(value * 10) / 10); }

// One object's members, one call each.
class Fields {
 public:
  explicit Fields(JsonWriter& json) : json_(json) {}
  void Int(const char* key, int64_t value) { json_.Key(key).Int(value); }
  void Number(const char* key, double value) { json_.Key(key).Float(Rounded(value)); }
  void Bool(const char* key, bool value) { json_.Key(key).Bool(value); }
  void Text(const char* key, std::string_view value) { json_.Key(key).String(value); }
  void TextOrNull(const char* key, std::string_view value) {
    json_.Key(key);
    value.empty() ? json_.Null() : json_.String(value);
  }
  void IdOrNull(const char* key, NodeId id) { TextOrNull(key, id == NodeId{} ? "" : ToString(id)); }

 private:
  JsonWriter& json_;
};

void WriteNumberOrNull(JsonWriter& json, std::optional<double> value) {
  value ? json.Float(Rounded(*value)) : json.Null();
}

void WriteLoad(JsonWriter& json, const MemberSnapshot& member) {
  const MemberLoad& load = member.load;
  Fields fields(json);
  json.Key("load").BeginObject();
  switch (member.role) {
    case ROLE_GATEWAY:
      fields.Int("sequences", load.running());
      fields.Int("connections", load.connections());
      break;
    case ROLE_ATTENTION:
      fields.Int("running", load.running());
      fields.Int("waiting", load.waiting());
      fields.Int("cache_pages_used", load.cache_pages_used());
      fields.Int("cache_pages_total", load.cache_pages_total());
      fields.Number("tokens_per_s", load.tokens_per_s());
      fields.Int("redispatched_rows", static_cast<int64_t>(load.redispatched_rows()));
      break;
    case ROLE_ROUTER:
      fields.Number("rows_per_s", load.rows_per_s());
      break;
    case ROLE_EXPERT:
      fields.Number("rows_per_s", load.rows_per_s());
      fields.Int("queued_rows", load.queued_rows());
      fields.Int("units", member.units);
      break;
    default:
      break;
  }
  json.EndObject();
}

void WriteMember(JsonWriter& json, const MemberSnapshot& member) {
  Fields fields(json);
  json.BeginObject();
  fields.Text("id", ToString(member.id));
  fields.TextOrNull("address", member.address);
  fields.Int("pid", member.pid);
  fields.Text("state", ToString(member.state));
  fields.TextOrNull("detail", member.detail);
  fields.Int("since_ms", absl::ToUnixMillis(member.since));
  WriteLoad(json, member);
  json.EndObject();
}

void WritePool(JsonWriter& json, const Pool& pool, const std::vector<MemberSnapshot>& all) {
  std::vector<const MemberSnapshot*> members;
  for (const MemberSnapshot& member : all) {
    if (member.role == pool.role) members.push_back(&member);
  }
  const auto count = [&](MemberState state) {
    return std::count_if(members.begin(), members.end(),
                         [state](const auto* m) { return m->state == state; });
  };
  const int64_t ready = count(MemberState::kReady);
  const bool whole = count(MemberState::kLost) + count(MemberState::kLoading) == 0;
  Fields fields(json);
  json.BeginObject();
  fields.Text("name", pool.name);
  fields.Text("role", pool.role_name);
  fields.Text("health", ready == 0 ? "down" : whole ? "ok" : "degraded");
  fields.Int("ready", ready);
  json.Key("members").BeginArray();
  for (const MemberSnapshot* member : members) WriteMember(json, *member);
  json.EndArray();
  json.EndObject();
}

void WriteHeat(JsonWriter& json, const ClusterSnapshot& cluster) {
  std::vector<const MemberSnapshot*> servers;
  for (const MemberSnapshot& member : cluster.members) {
    if (member.role == ROLE_EXPERT && member.state != MemberState::kLeft) servers.push_back(&member);
  }
  Fields fields(json);
  json.Key("heat").BeginObject();
  fields.Int("servers_total", std::ssize(servers));
  servers.resize(std::min(servers.size(), kHeatServersMax));
  json.Key("layers").BeginArray();
  for (const uint32_t layer : cluster.layers) json.Unsigned(layer);
  json.EndArray();
  json.Key("servers").BeginArray();
  for (const MemberSnapshot* server : servers) json.String(ToString(server->id));
  json.EndArray();
  json.Key("rows_per_s").BeginArray();
  for (size_t layer = 0; layer < cluster.layers.size(); ++layer) {
    json.BeginArray();
    for (const MemberSnapshot* server : servers) {
      const auto& rows = server->load.layer_rows_per_s();
      json.Float(rows.size() == std::ssize(cluster.layers) ? Rounded(rows[static_cast<int>(layer)]) : 0.f);
    }
    json.EndArray();
  }
  json.EndArray();
  json.EndObject();
}

void WriteTraffic(JsonWriter& json, const GatewaySnapshot& gateway) {
  const TrafficMeter::Summary& traffic = gateway.traffic;
  Fields fields(json);
  const auto latency = [&json](const char* key, const TrafficMeter::Latency& value) {
    json.Key(key).BeginObject();
    json.Key("p50");
    WriteNumberOrNull(json, value.p50_ms);
    json.Key("p95");
    WriteNumberOrNull(json, value.p95_ms);
    json.EndObject();
  };
  const auto series = [&](const char* key, auto&& write) {
    json.Key(key).BeginArray();
    for (const TrafficMeter::Second& second : traffic.series) write(second);
    json.EndArray();
  };
  json.Key("traffic").BeginObject();
  fields.Int("window_s", TrafficMeter::kWindowSeconds);
  fields.Int("sequences", gateway.sequences);
  fields.Number("tokens_per_s", traffic.tokens_per_s);
  fields.Number("prompt_tokens_per_s", traffic.prompt_tokens_per_s);
  fields.Number("sequences_per_s", traffic.sequences_per_s);
  fields.Int("failed", static_cast<int64_t>(traffic.failed));
  latency("first_token_ms", traffic.first_token);
  latency("token_ms", traffic.token);
  json.Key("series").BeginObject();
  series("tokens", [&](const TrafficMeter::Second& second) { json.Unsigned(second.tokens); });
  series("first_token_ms",
         [&](const TrafficMeter::Second& second) { WriteNumberOrNull(json, second.first_token_ms); });
  series("token_ms", [&](const TrafficMeter::Second& second) { WriteNumberOrNull(json, second.token_ms); });
  json.EndObject();
  json.EndObject();
}

void WriteEvents(JsonWriter& json, const std::vector<ClusterEvent>& events) {
  Fields fields(json);
  json.Key("events").BeginArray();
  for (const ClusterEvent& event : events) {
    json.BeginObject();
    fields.Int("number", static_cast<int64_t>(event.number));
    fields.Int("time_ms", absl::ToUnixMillis(event.at));
    fields.Text("kind", event.kind);
    fields.Text("text", event.text);
    fields.IdOrNull("node", event.node);
    json.EndObject();
  }
  json.EndArray();
}

}  // namespace

const char* ToString(MemberState state) {
  switch (state) {
    case MemberState::kLoading:
      return "loading";
    case MemberState::kReady:
      return "ready";
    case MemberState::kDraining:
      return "draining";
    case MemberState::kLost:
      return "lost";
    case MemberState::kLeft:
      return "left";
  }
  return "";
}

std::string ToJson(const ClusterSnapshot& cluster, const GatewaySnapshot& gateway) {
  std::string text;
  JsonWriter json(&text);
  Fields fields(json);
  json.BeginObject();
  fields.Int("schema", kSchema);
  fields.Int("time_ms", absl::ToUnixMillis(cluster.at));
  fields.IdOrNull("gateway", gateway.id);
  fields.Text("version", gateway.version);
  json.Key("model").BeginObject();
  fields.Text("name", gateway.model);
  fields.Int("context_length", gateway.context_length);
  fields.Bool("chat", gateway.chat);
  json.EndObject();
  fields.Bool("operator", gateway.operated);
  fields.Text("registry", gateway.registry);
  fields.Bool("registry_connected", cluster.registry_connected);
  fields.Bool("ready", gateway.not_ready_reason.empty());
  fields.TextOrNull("not_ready_reason", gateway.not_ready_reason);
  json.Key("epoch").BeginObject();
  fields.Int("term", cluster.epoch.term);
  fields.Int("counter", cluster.epoch.counter);
  json.EndObject();
  fields.IdOrNull("leader", cluster.leader);
  json.Key("pools").BeginArray();
  for (const Pool& pool : kPools) WritePool(json, pool, cluster.members);
  json.EndArray();
  WriteHeat(json, cluster);
  WriteTraffic(json, gateway);
  WriteEvents(json, cluster.events);
  json.EndObject();
  return text;
}

}  // namespace minke::gateway
