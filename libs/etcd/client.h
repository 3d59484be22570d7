// A client of etcd's v3 API (3.4 or later), as much of it as a registry needs. Calls block, each with a
// deadline, and fail over between endpoints; nothing here tries again for ever but Mirror and Lease, which
// have threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/tls/identity.h"

namespace minke::etcd {

struct ClientOptions {
  std::vector<std::string> endpoints;                 // host:port, at least one
  absl::Duration call_timeout = absl::Seconds(1);     // of a call at one endpoint
  std::shared_ptr<tls::Identity> identity = nullptr;  // null: plaintext
};

struct KeyValue {
  std::string key, value;
  int64_t create_revision = 0, mod_revision = 0;
  int64_t lease = 0;  // 0: none
};

struct Snapshot {
  std::vector<KeyValue> keys;  // ascending
  int64_t revision = 0;        // of the whole store, when they were read
};

// All of `compares` hold: `then` is done, otherwise `otherwise`; either as one step.
struct Transaction {
  struct Compare {
    enum class What { kCreateRevision, kModRevision, kValue };
    What what = What::kCreateRevision;
    std::string key;
    int64_t revision = 0;  // 0: there is no such key
    std::string value;
    bool prefix = false;  // with revision 0: no key begins so
  };
  struct Operation {
    enum class What { kGet, kPut, kDelete };
    What what = What::kGet;
    std::string key, value;
    int64_t lease = 0;
  };
  std::vector<Compare> compares;
  std::vector<Operation> then, otherwise;

  Transaction& IfCreated(std::string key, int64_t revision);   // at this revision; 0: absent
  Transaction& IfModified(std::string key, int64_t revision);  // last at this revision; 0: absent
  Transaction& IfValue(std::string key, std::string value);
  Transaction& IfNoneUnder(std::string prefix);
  Transaction& Put(std::string key, std::string value, int64_t lease = 0);
  Transaction& Delete(std::string key);
  Transaction& OtherwiseGet(std::string key);
};

struct TransactionResult {
  bool succeeded = false;
  int64_t revision = 0;
  std::vector<KeyValue> got;  // by the gets that were done
};

// Thread-safe. UNAVAILABLE or DEADLINE_EXCEEDED: no endpoint answered in time, and what was asked for may
// have been done or not; CANCELLED after CancelCalls().
class Client {
 public:
  explicit Client(ClientOptions options);
  ~Client();

  absl::StatusOr<Snapshot> Get(const std::string& key);
  absl::StatusOr<Snapshot> GetPrefix(const std::string& prefix);
  // NOT_FOUND: there is no such lease. Returns the new revision.
  absl::StatusOr<int64_t> Put(const std::string& key, const std::string& value, int64_t lease = 0);
  absl::StatusOr<TransactionResult> Commit(const Transaction& transaction);
  // Forgets what keys were before `revision`, for everybody.
  absl::Status Compact(int64_t revision);

  // etcd rounds up to seconds and may grant more. Its id.
  absl::StatusOr<int64_t> GrantLease(absl::Duration ttl);
  // What it lasts from now on. NOT_FOUND: it ran out.
  absl::StatusOr<absl::Duration> RenewLease(int64_t lease);
  // Ends it, and with it the keys that it holds.
  absl::Status RevokeLease(int64_t lease);

  // Ends the calls and watches under way; later ones work.
  void CancelCalls();

 private:
  friend class Mirror;
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

// A lease of our own, renewed three times per lease time, and while nobody answers every 200 ms, on a thread
// of its own. Thread-safe.
class Lease {
 public:
  // Borrows the client. on_expired: called once, on the lease's thread, when expired() begins to hold.
  static absl::StatusOr<std::unique_ptr<Lease>> Grant(Client& client, absl::Duration ttl,
                                                      std::function<void()> on_expired = nullptr);
  ~Lease();  // revokes it

  int64_t id() const;
  // Whether etcd surely still has it: not a lease time has passed since the last renewal was asked for.
  bool alive() const;
  // etcd said that it has run out: it will not come back.
  bool expired() const;

 private:
  struct Impl;
  explicit Lease(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

// A copy of every key under a prefix that follows etcd's, on a thread of its own: a snapshot, then a watch
// from the revision after it; and again after every interruption (an endpoint gone, history compacted away),
// because an etcd that came back may have lost its data and count revisions anew. A watch has no deadline: it
// ends with the first call of the client that goes unanswered, or with etcd's own word that it has no leader.
class Mirror {
 public:
  struct Change {
    bool snapshot = false;  // `put` is all there is
    std::vector<KeyValue> put;
    std::vector<std::string> deleted;
    int64_t revision = 0;
  };
  // Called on the mirror's thread. lost: the copy may be old until the next snapshot.
  struct Events {
    std::function<void(const Change&)> changed;
    std::function<void(const absl::Status&)> lost;
  };
  // Borrows the client.
  Mirror(Client& client, std::string prefix, Events events);
  ~Mirror();  // cancels the client's calls

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace minke::etcd
