// The keys that callers may use, from a file that is read again when it changes. Thread-safe.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "libs/base/mutex.h"
#include "services/gateway/keys/key_file.h"

namespace minke::gateway {

class ApiKeys {
 public:
  // An error if the file cannot be read or has no key: a server that was meant to be closed must not open. A
  // changed file that has an error is logged, and the keys stay as they were.
  static absl::StatusOr<std::shared_ptr<ApiKeys>> Load(std::string path, KeyKind kind);

  // The account of the key in `authorization`, the header's value "Bearer KEY"; null: it is none.
  std::shared_ptr<KeyAccount> Find(std::string_view authorization);
  void Collect(telemetry::Page& page) const;

 private:
  struct Version {  // of the file
    std::chrono::nanoseconds modified{0};
    uint64_t inode = 0, bytes = 0;
    friend bool operator==(const Version&, const Version&) = default;
  };
  using Accounts = absl::flat_hash_map<std::string, std::shared_ptr<KeyAccount>>;

  ApiKeys(std::string path, KeyKind kind) : path_(std::move(path)), kind_(kind) {}
  absl::Status Unreadable() const;
  absl::StatusOr<Version> FileVersion() const;
  absl::Status ReadLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReadAgainIfChangedLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  const KeyKind kind_;
  mutable Mutex mutex_;
  Version version_ ABSL_GUARDED_BY(mutex_);
  std::chrono::steady_clock::time_point looked_ ABSL_GUARDED_BY(mutex_);
  // By the SHA-256 of the key: a lookup takes the same time however much of a key is right, and no key stays
  // in memory.
  Accounts accounts_ ABSL_GUARDED_BY(mutex_);
};

// Whether a caller may do what these keys guard: everybody, without keys.
inline bool Allows(ApiKeys* keys, std::string_view authorization) {
  return keys == nullptr || keys->Find(authorization) != nullptr;
}

}  // namespace minke::gateway
