// The gRPC edge of the transfer of weights: a running node's answer, and a new node's question.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/tls/identity.h"
#include "proto/cluster/weights.grpc.pb.h"
#include "services/attention/weights/weight_giver.h"

namespace minke::attention {

// Thread-safe.
class WeightsApi final : public cluster::v1::Weights::CallbackService {
 public:
  // REQUIRES: before the gRPC server starts. Borrowed.
  void SetGiver(WeightGiver* giver) { giver_ = giver; }
  grpc::ServerUnaryReactor* Ask(grpc::CallbackServerContext* context,
                                const cluster::v1::WeightsRequest* request,
                                cluster::v1::WeightsOffer* offer) override;

 private:
  WeightGiver* giver_ = nullptr;
};

// Asks the node at `address` (host:port of its gRPC server) for its weights; returns the group's id. Errors:
// the giver's, UNAVAILABLE when nobody answers. `identity`: null for plaintext.
absl::StatusOr<std::string> AskForWeights(const std::string& address, const WeightsIdentity& wanted,
                                          absl::Duration timeout,
                                          std::shared_ptr<tls::Identity> identity = nullptr);

}  // namespace minke::attention
