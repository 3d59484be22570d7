// What etcd's answers say, as values. Pure.
#pragma once

#include "libs/etcd/client.h"
#include "proto/etcd/etcd.pb.h"

namespace minke::etcd {

KeyValue FromProto(const etcdserverpb::KeyValue& proto);
Snapshot SnapshotOf(const etcdserverpb::RangeResponse& response);
// Of several events of one key within the answer only the last counts: each key is named once, put or
// deleted, both in ascending order.
Mirror::Change ChangeOf(const etcdserverpb::WatchResponse& response);

}  // namespace minke::etcd
