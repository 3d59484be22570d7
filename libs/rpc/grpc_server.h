// A gRPC server with health checking and reflection, the way every process of ours runs one.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/rpc/credentials.h"

namespace minke::rpc {

class GrpcServer {
 public:
  // `listen` is host:port, port 0 for a free one; the services are borrowed until Shutdown. One clear error
  // when the address cannot be had. Adds grpc.health.v1 and reflection. `identity`: null for plaintext.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const std::string& listen,
                                                           const std::vector<grpc::Service*>& services,
                                                           std::shared_ptr<tls::Identity> identity = nullptr);
  ~GrpcServer();

  int port() const { return port_; }
  // What grpc.health.v1 answers for the whole server.
  void SetServing(bool serving);
  // Stops accepting; calls still open after `grace` are cancelled. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  GrpcServer() = default;
  std::shared_ptr<grpc::ServerCredentials> credentials_;  // asked by the server as long as it lives
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  bool down_ = false;
};

absl::Status ToAbsl(const grpc::Status& status);
grpc::Status ToGrpc(const absl::Status& status);

// host of "host:port".
std::string HostOf(const std::string& address);

}  // namespace minke::rpc
