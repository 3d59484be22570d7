#include "services/gateway/operator_client/operator_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <utility>

#include "libs/base/strings.h"
#include "proto/cluster/operator.grpc.pb.h"

namespace minke::gateway {
namespace {

namespace v1 = cluster::v1;

constexpr std::chrono::seconds kCallTimeout{10};

}  // namespace

struct OperatorClient::Impl {
  explicit Impl(const std::string& socket_path)
      : channel([&] {
          grpc::ChannelArguments arguments;
          arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
          return grpc::CreateCustomChannel("unix:" + socket_path, grpc::InsecureChannelCredentials(),
                                           arguments);
        }()),
        stub(v1::Operator::NewStub(channel)) {}

  const std::shared_ptr<grpc::Channel> channel;  // shared with the stub
  const std::unique_ptr<v1::Operator::Stub> stub;
};

namespace {

// What lives as long as a call.
template <typename Request, typename Answer>
struct Call {
  std::shared_ptr<void> owner;  // keeps the stub
  grpc::ClientContext context;
  Request request;
  Answer answer;
  OperatorClient::Done<Answer> done;
};

template <typename Request, typename Answer, typename Method>
void Start(std::shared_ptr<void> owner, v1::Operator::Stub& stub, Method method, Request request,
           OperatorClient::Done<Answer> done) {
  auto* call = new Call<Request, Answer>{
      .owner = std::move(owner), .request = std::move(request), .done = std::move(done)};
  call->context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
  (stub.async()->*method)(&call->context, &call->request, &call->answer, [call](const grpc::Status& status) {
    const std::unique_ptr<Call<Request, Answer>> ended(call);
    if (status.ok()) return ended->done(std::move(ended->answer));
    ended->done(absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message()));
  });
}

}  // namespace

OperatorClient::OperatorClient(const std::string& socket_path) : impl_(std::make_shared<Impl>(socket_path)) {}
OperatorClient::~OperatorClient() = default;

void OperatorClient::Scale(v1::Role role, uint32_t count, Done<v1::ScaleAnswer> done) {
  v1::ScaleRequest request;
  request.set_role(role);
  request.set_count(count);
  using Method = void (v1::Operator::Stub::async::*)(grpc::ClientContext*, const v1::ScaleRequest*,
                                                     v1::ScaleAnswer*, std::function<void(grpc::Status)>);
  Start<v1::ScaleRequest, v1::ScaleAnswer>(impl_, *impl_->stub,
                                           static_cast<Method>(&v1::Operator::Stub::async::Scale),
                                           std::move(request), std::move(done));
}

void OperatorClient::Drain(v1::Role role, int32_t pid, Done<v1::DrainAnswer> done) {
  v1::DrainRequest request;
  request.set_role(role);
  request.set_pid(pid);
  using Method = void (v1::Operator::Stub::async::*)(grpc::ClientContext*, const v1::DrainRequest*,
                                                     v1::DrainAnswer*, std::function<void(grpc::Status)>);
  Start<v1::DrainRequest, v1::DrainAnswer>(impl_, *impl_->stub,
                                           static_cast<Method>(&v1::Operator::Stub::async::Drain),
                                           std::move(request), std::move(done));
}

void OperatorClient::Status(Done<v1::StatusAnswer> done) {
  using Method = void (v1::Operator::Stub::async::*)(grpc::ClientContext*, const v1::StatusRequest*,
                                                     v1::StatusAnswer*, std::function<void(grpc::Status)>);
  Start<v1::StatusRequest, v1::StatusAnswer>(
      impl_, *impl_->stub, static_cast<Method>(&v1::Operator::Stub::async::Status), {}, std::move(done));
}

}  // namespace minke::gateway
