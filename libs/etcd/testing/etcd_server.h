// A real etcd for tests, which can be frozen, killed, and started again with or without what it knew.
#pragma once

#include <sys/types.h>

#include <string>

namespace minke::etcd {

// Single-threaded; every function aborts the test program when it cannot do what it says.
class EtcdServer {
 public:
  EtcdServer();  // starts one on free ports, in a temporary folder, and waits until it answers
  ~EtcdServer();

  std::string address() const;
  void Kill();  // -9
  void Freeze();
  void Thaw();
  // REQUIRES: killed.
  void StartAgain(bool with_data);

 private:
  void Start();

  int client_port_ = 0, peer_port_ = 0;
  std::string directory_;
  pid_t pid_ = -1;
};

}  // namespace minke::etcd
