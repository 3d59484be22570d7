// Asks the `minke up` of this cluster to scale and to drain, over its operator socket
// (proto/cluster/operator.proto). Thread-safe; calls never block.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/cluster/operator.pb.h"

namespace minke::gateway {

class OperatorClient {
 public:
  template <typename Answer>
  using Done = std::function<void(absl::StatusOr<Answer>)>;  // once, on any thread

  // `socket_path`: there when the first call is made, not before.
  explicit OperatorClient(const std::string& socket_path);
  ~OperatorClient();  // does not wait for calls under way: their Done comes later

  // UNAVAILABLE if nobody listens, DEADLINE_EXCEEDED after 10 s, else what the operator says.
  void Scale(cluster::v1::Role role, uint32_t count, Done<cluster::v1::ScaleAnswer> done);
  void Drain(cluster::v1::Role role, int32_t pid, Done<cluster::v1::DrainAnswer> done);
  void Status(Done<cluster::v1::StatusAnswer> done);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;  // shared with calls under way
};

}  // namespace minke::gateway
