// What etcd answers, down to what this cluster makes of it: a watch's events (or, by the first byte, values
// put one after the other under this cluster's keys) change what is known, every view of it is sound, and the
// coordinator decides on it.
#include <set>

#include "libs/base/log.h"
#include "libs/cluster/make_view.h"
#include "libs/etcd/answers.h"
#include "libs/registry/etcd_state.h"
#include "services/router/placement/coordinator.h"
#include "tests/fuzz/fuzz.h"

namespace {

using namespace minke;

// Events in a form that mutations keep whole: kind of key, number of the member, length, value.
etcdserverpb::WatchResponse Made(fuzz::Input& input, const registry::EtcdKeys& keys) {
  etcdserverpb::WatchResponse response;
  for (int i = 0; i < 32 && !input.empty(); ++i) {
    etcdserverpb::Event& event = *response.add_events();
    const auto what = input.Take<uint8_t>();
    const uint64_t number = 1 + input.Take<uint8_t>() % 8;
    if (what & 0x80) event.set_type(etcdserverpb::Event::DELETE);
    const std::string_view value = input.TakeBytes(input.Take<uint16_t>());
    auto& kv = *event.mutable_kv();
    kv.set_mod_revision(i + 1);
    kv.set_create_revision(1);
    kv.set_value(std::string(value));
    switch (what % 5) {
      case 0:
      case 1: {
        kv.set_key(keys.Member(NodeId{number}));
        // Reports get past the check of their own id, so that what they say is looked at.
        cluster::v1::MemberReport report;
        if (what % 5 == 0 && report.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
          report.mutable_member()->set_node_id(number);
          kv.set_value(report.SerializeAsString());
        }
        break;
      }
      case 2:
        kv.set_key(keys.placement);
        break;
      case 3:
        kv.set_key(keys.leader);
        break;
      default:
        kv.set_key(keys.root + std::string(value.substr(0, 20)));
    }
  }
  return response;
}

void CheckState(const registry::EtcdState& state) {
  for (const auto& [id, report] : state.members) {
    FUZZ_ASSERT(id != NodeId{} && report.member().node_id() == id.value);
  }
  const cluster::v1::ClusterView view = cluster::MakeView(state.members, state.record);
  for (const auto& member : view.members()) FUZZ_ASSERT(state.members.contains(NodeId{member.node_id()}));
  for (const auto& unit : view.placement()) {
    for (const uint64_t id : unit.node_ids()) FUZZ_ASSERT(state.members.contains(NodeId{id}));
  }
}

// A model of 2 layers and 4 groups.
void CheckDecision(const registry::EtcdState& state) {
  router::CoordinatorOptions options;
  for (uint32_t layer : {1u, 2u}) {
    for (uint32_t group = 0; group < 4; ++group) options.units.push_back({layer, group});
  }
  options.shape = {.unit_bytes = 1e6, .experts = 2, .experts_per_row = 1, .flops_per_row = 1e6};
  const cluster::v1::PlacementRecord record = router::Decide(options, state.members, state.record, 1);
  const std::set<UnitId> units(options.units.begin(), options.units.end());
  for (const auto& unit : record.placement()) {
    FUZZ_ASSERT(units.contains(UnitId{unit.unit().layer(), unit.unit().group()}));
    FUZZ_ASSERT(unit.weights_size() == unit.node_ids_size());
  }
  for (const auto& assignment : record.assigned()) {
    for (const auto& unit : assignment.units())
      FUZZ_ASSERT(units.contains(UnitId{unit.layer(), unit.group()}));
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  minke::log::SetLevel(minke::log::Level::kError);  // warnings about what is malformed are right, and many
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  fuzz::Input input(data, bytes);
  static const registry::EtcdKeys keys("minke");
  registry::EtcdState state;
  std::set<NodeId> kept = {NodeId{1}};
  etcdserverpb::WatchResponse response;
  const auto form = input.Take<uint8_t>() % 3;
  if (form == 0) {
    response = Made(input, keys);
  } else if (form == 1) {
    if (!response.ParseFromArray(input.rest().data(), static_cast<int>(input.rest().size()))) return 0;
  } else {
    etcdserverpb::RangeResponse range;
    if (!range.ParseFromArray(input.rest().data(), static_cast<int>(input.rest().size()))) return 0;
    const etcd::Snapshot snapshot = etcd::SnapshotOf(range);
    FUZZ_ASSERT(static_cast<int>(snapshot.keys.size()) == range.kvs_size());
    for (const auto& kv : range.kvs()) *response.add_events()->mutable_kv() = kv;
  }
  const etcd::Mirror::Change change = etcd::ChangeOf(response);
  std::set<std::string> seen;
  for (const auto& kv : change.put) FUZZ_ASSERT(seen.insert(kv.key).second);
  for (const std::string& key : change.deleted) FUZZ_ASSERT(seen.insert(key).second);
  for (const auto& kv : change.put) {
    const registry::Learned learned = registry::ApplyPut(keys, kv, state, kept);
    FUZZ_ASSERT(learned.more || learned.loads || state.members.size() < change.put.size());
    CheckState(state);
  }
  CheckDecision(state);
  return 0;
}
