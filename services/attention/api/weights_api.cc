#include "services/attention/api/weights_api.h"

#include <grpcpp/grpcpp.h>

#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/rpc/grpc_server.h"

namespace minke::attention {

grpc::ServerUnaryReactor* WeightsApi::Ask(grpc::CallbackServerContext* context,
                                          const cluster::v1::WeightsRequest* request,
                                          cluster::v1::WeightsOffer* offer) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::StatusOr<std::string> id = giver_->Offer({.model_fingerprint = request->model_fingerprint(),
                                                  .precision = request->precision(),
                                                  .plan_checksum = request->plan_checksum()});
  if (id.ok()) offer->set_group_id(*std::move(id));
  reactor->Finish(rpc::ToGrpc(id.status()));
  return reactor;
}

absl::StatusOr<std::string> AskForWeights(const std::string& address, const WeightsIdentity& wanted,
                                          absl::Duration timeout, std::shared_ptr<tls::Identity> identity) {
  const auto stub = cluster::v1::Weights::NewStub(
      rpc::SecureChannel(address, std::move(identity), grpc::ChannelArguments()).Get());
  cluster::v1::WeightsRequest request;
  request.set_model_fingerprint(wanted.model_fingerprint);
  request.set_precision(wanted.precision);
  request.set_plan_checksum(wanted.plan_checksum);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  cluster::v1::WeightsOffer offer;
  const grpc::Status asked = stub->Ask(&context, request, &offer);
  if (!asked.ok()) return Annotate(rpc::ToAbsl(asked), address);
  return offer.group_id();
}

}  // namespace minke::attention
