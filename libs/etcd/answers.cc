#include "libs/etcd/answers.h"

#include <map>

namespace minke::etcd {

KeyValue FromProto(const etcdserverpb::KeyValue& proto) {
  return {.key = proto.key(),
          .value = proto.value(),
          .create_revision = proto.create_revision(),
          .mod_revision = proto.mod_revision(),
          .lease = proto.lease()};
}

Snapshot SnapshotOf(const etcdserverpb::RangeResponse& response) {
  Snapshot snapshot;
  for (const auto& kv : response.kvs()) snapshot.keys.push_back(FromProto(kv));
  snapshot.revision = response.header().revision();
  return snapshot;
}

Mirror::Change ChangeOf(const etcdserverpb::WatchResponse& response) {
  std::map<std::string_view, const etcdserverpb::Event*> last;
  for (const auto& event : response.events()) last[event.kv().key()] = &event;
  Mirror::Change change{.revision = response.header().revision()};
  for (const auto& [key, event] : last) {
    if (event->type() == etcdserverpb::Event::DELETE) {
      change.deleted.emplace_back(key);
    } else {
      change.put.push_back(FromProto(event->kv()));
    }
  }
  return change;
}

}  // namespace minke::etcd
