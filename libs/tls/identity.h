// Who this process is to others over TLS, and whom it believes; follows its files while the process runs.
#pragma once

#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/base/mutex.h"
#include "libs/tls/material.h"

namespace minke::tls {

struct IdentityOptions {
  // What peers' certificates have to be valid for instead of the host that was dialled; empty: that host.
  std::string peer_name;
  // How often the files are looked at. New content counts once two looks in a row have found the same.
  absl::Duration period = absl::Seconds(1);
};

// Thread-safe. A thread of its own reads the files. New content is used by connections that begin afterwards;
// those that are open stay as they are. Content that cannot be used, such as a new certificate beside the old
// key, or files that are gone, leave what was there in force; a warning says why, once.
class Identity {
 public:
  // Errors: as Load. REQUIRES: !files.empty().
  static absl::StatusOr<std::shared_ptr<Identity>> Open(Files files, Use use, IdentityOptions options = {});
  ~Identity();

  std::shared_ptr<const Material> current() const;
  const std::string& peer_name() const { return options_.peer_name; }

 private:
  Identity(Files files, Use use, IdentityOptions options)
      : files_(std::move(files)), use_(use), options_(std::move(options)) {}
  void Run();
  void Look();
  void Take(Texts texts);
  void WarnOnce(std::string message);
  void WarnIfItEndsSoon(const Material& material);

  const Files files_;
  const Use use_;
  const IdentityOptions options_;
  mutable Mutex mutex_;
  std::shared_ptr<const Material> current_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  // The thread's own.
  Texts used_, seen_;    // in force or refused; at the last look
  std::string warned_;   // why it was not taken, as last said
  std::string ending_;   // serial of the certificate of which the log says that it ends soon
  std::string failing_;  // why the last look failed
  std::thread thread_;
};

}  // namespace minke::tls
