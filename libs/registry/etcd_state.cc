#include "libs/registry/etcd_state.h"

#include <charconv>
#include <cmath>

#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::registry {
namespace {

// Weights are none, or one per server: whoever reads them counts on it.
bool IsSound(const cluster::v1::PlacementRecord& record) {
  for (const auto& unit : record.placement()) {
    if (unit.weights_size() != 0 && unit.weights_size() != unit.node_ids_size()) return false;
    for (const float weight : unit.weights()) {
      if (!std::isfinite(weight) || weight < 0) return false;
    }
  }
  return true;
}

}  // namespace

EtcdKeys::EtcdKeys(const std::string& cluster)
    : root(StrCat("/minke/", cluster, "/")),
      members(root + "members/"),
      model(root + "model"),
      placement(root + "placement"),
      leader(root + "leader") {}

NodeId ParseNodeId(std::string_view hex) {
  NodeId id;
  const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), id.value, 16);
  return error == std::errc() && end == hex.data() + hex.size() ? id : NodeId{};
}

Learned ApplyPut(const EtcdKeys& keys, const etcd::KeyValue& kv, EtcdState& state, std::set<NodeId>& kept) {
  if (kv.key.starts_with(keys.members)) {
    const NodeId id = ParseNodeId(std::string_view(kv.key).substr(keys.members.size()));
    cluster::v1::MemberReport member;
    if (id == NodeId{} || !member.ParseFromString(kv.value) || member.member().node_id() != id.value) {
      log::Warning("registry", StrCat("key=", kv.key, " is no member's report; it does not count"));
      return {};
    }
    const bool was_kept = kept.erase(id) > 0;
    const auto [it, fresh] = state.members.try_emplace(id);
    const bool only_load = !fresh && !was_kept && cluster::OnlyLoadDiffers(it->second, member);
    it->second = std::move(member);
    return {.more = !only_load, .loads = true};
  }
  if (kv.key == keys.placement) {
    cluster::v1::PlacementRecord record;
    if (!record.ParseFromString(kv.value) || !IsSound(record)) {
      log::Warning("registry", StrCat("key=", kv.key, " is no placement; the last one stays"));
      return {};
    }
    state.record = std::move(record);
    state.record_revision = kv.mod_revision;
  } else if (kv.key == keys.leader) {
    state.leader = ParseNodeId(kv.value);
    state.leader_revision = kv.create_revision;
    state.leader_lease = kv.lease;
    return {.more = true, .loads = true};
  }
  return {.more = true};
}

}  // namespace minke::registry
