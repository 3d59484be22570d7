// How `minke scale` (and the gateway, services/gateway/operator_client) reaches the `minke up` of the same
// user: gRPC (proto/cluster/operator.proto) on a unix socket that is named by the cluster's HTTP port.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/cluster/operator.pb.h"

namespace minke::cli {

// Path of the socket; `runtime_directory`: XDG_RUNTIME_DIR, null or empty: /tmp.
std::string OperatorSocketPath(int http_port, const char* runtime_directory, unsigned user);
// The same for this process.
std::string OperatorSocketPath(int http_port);

class OperatorServer {
 public:
  struct Calls {
    std::function<absl::StatusOr<cluster::v1::ScaleAnswer>(const cluster::v1::ScaleRequest&)> scale;
    std::function<absl::StatusOr<cluster::v1::DrainAnswer>(const cluster::v1::DrainRequest&)> drain;
    std::function<cluster::v1::StatusAnswer()> status;
  };
  // Listens at `path`, for this user only. A socket there that nobody listens on is replaced; ALREADY_EXISTS
  // if somebody does, UNAVAILABLE if it cannot be had otherwise.
  static absl::StatusOr<std::unique_ptr<OperatorServer>> Start(const std::string& path, Calls calls);
  ~OperatorServer();  // calls that are waiting get UNAVAILABLE; removes the socket

  // Becomes readable when a call waits for RunPending, which makes it on the caller's thread.
  int wake_fd() const;
  void RunPending();

 private:
  class Impl;
  explicit OperatorServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class OperatorClient {
 public:
  // NOT_FOUND if `minke up` of this user serves no cluster on the port.
  static absl::StatusOr<std::unique_ptr<OperatorClient>> Connect(int http_port);
  ~OperatorClient();
  absl::StatusOr<cluster::v1::ScaleAnswer> Scale(cluster::v1::Role role, int count);
  absl::StatusOr<cluster::v1::StatusAnswer> Status();

 private:
  struct Stub;
  explicit OperatorClient(std::unique_ptr<Stub> stub);
  std::unique_ptr<Stub> stub_;
};

}  // namespace minke::cli
