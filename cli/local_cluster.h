// The processes of a cluster on this machine: how each role is started, scaled, and started again when it
// dies.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/pool.h"
#include "cli/process.h"
#include "cli/role_arguments.h"
#include "cli/up_flags.h"
#include "cli/url.h"
#include "libs/base/cpus.h"
#include "proto/cluster/operator.pb.h"

namespace minke::cli {

// For one thread, which has to outlive it (children die with the thread that started them), but for
// MarkReady.
class LocalCluster {
 public:
  // REQUIRES: Validate(flags).
  explicit LocalCluster(const UpFlags& flags);
  ~LocalCluster();  // stops all, within seconds
  LocalCluster(const LocalCluster&) = delete;
  LocalCluster& operator=(const LocalCluster&) = delete;

  // Starts every process, and returns where HTTP is served. `stop_fd` becomes readable when the user wants to
  // stop: then CANCELLED.
  absl::StatusOr<Url> Start(int stop_fd);

  // The cluster has served: from here on it can be scaled, and goes on when a process dies. Any thread.
  void MarkReady() { ready_.store(true); }

  // Looks after the processes; to be called often. An error when the cluster cannot go on: somebody died
  // before it was ready, or its gateway did and is not to be started again.
  absl::Status Tend();
  // How long Tend can wait, unless a child dies.
  absl::Duration Patience() const;

  // The targets file: --targets-file or the default. Known once started.
  const std::string& targets_file() const { return targets_file_; }

  absl::StatusOr<cluster::v1::ScaleAnswer> Scale(Role role, int64_t count);
  absl::StatusOr<cluster::v1::DrainAnswer> Drain(Role role, int32_t pid);
  cluster::v1::StatusAnswer Status() const;
  // Where the operator's socket is: the gateway was told a name for it that is known before the HTTP port is.
  absl::Status LinkOperatorSocket(const std::string& path) const;

 private:
  struct Member {
    cluster::v1::Child info;
    Child process;
    std::string cpus;     // expert servers, attention nodes
    bool trace = false;   // attention nodes
    std::string metrics;  // HOST:PORT of /metrics, of its last life that listened
    RestartPause pause;
    absl::Time started_at, restart_at;
  };

  absl::Status StartEtcd();
  // A new process of the role; the last of members_.
  absl::Status Add(Role role);
  absl::Status Launch(Member& member);
  std::vector<std::string> ArgumentsOf(const Member& member) const;
  std::string NextCpus();
  // Replaces the targets file if it would say something else. An error if it cannot; once for every content.
  absl::Status WriteTargets();
  int Staying(Role role) const;
  // What becomes of a member whose process has ended. OK: it may stay or was restarted.
  absl::Status OnEnd(Member& member, int status);
  void Restart(Member& member);
  void AskToLeave(Member& member);
  void Schedule(Member& member, absl::Duration life, const std::string& what);

  const UpFlags flags_;
  const std::vector<std::string>
      numa_nodes_;         // servers take turns on them; fewer than two: they run anywhere
  std::string directory_;  // of our own: the secret, etcd's data
  LocalAddresses addresses_;
  std::string etcd_program_;
  std::vector<std::string> etcd_arguments_;
  std::vector<Member> members_;                  // oldest first
  int named_[cluster::v1::Role_ARRAYSIZE] = {};  // names given, by role
  size_t next_numa_node_ = 0;
  Url http_;
  std::string targets_file_, targets_written_;
  std::atomic<bool> ready_{false};
};

}  // namespace minke::cli
