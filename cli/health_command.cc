#include "cli/health_command.h"

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>

#include "absl/time/clock.h"
#include "cli/http_client.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/rpc/credentials.h"
#include "libs/rpc/grpc_server.h"
#include "proto/health/health.grpc.pb.h"

namespace minke::cli {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

absl::Status AskHttp(const HealthFlags& flags) {
  MK_ASSIGN_OR_RETURN(const Url url, ParseUrl(flags.url));
  MK_ASSIGN_OR_RETURN(Endpoint server, flags.pin.empty() ? ToEndpoint(url, flags.tls)
                                                         : ToOwnGateway(url, flags.pin, flags.tls));
  if (server.url.path.empty()) server.url.path = "/health";
  server.name = flags.name;
  MK_ASSIGN_OR_RETURN(const HttpAnswer answer,
                      HttpGet(server, server.url.path, absl::Seconds(flags.timeout_s)));
  if (answer.status == 200) return absl::OkStatus();
  return absl::UnavailableError(StrCat(server.url.Base(), ": ", answer.status, " ", ErrorText(answer.body)));
}

absl::Status AskGrpc(const HealthFlags& flags) {
  std::shared_ptr<tls::Identity> identity;
  if (!flags.tls.empty()) {
    if (flags.tls.ca.path.empty())
      return absl::InvalidArgumentError("--cert: expected --ca beside it with --grpc, found none");
    MK_ASSIGN_OR_RETURN(identity,
                        tls::Identity::Open(flags.tls, tls::Use::kClient, {.peer_name = flags.name}));
  } else if (!flags.name.empty()) {
    return absl::InvalidArgumentError("--name: expected --ca beside it, found none");
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  const auto stub = Health::NewStub(rpc::SecureChannel(flags.grpc, identity, arguments).Get());
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(flags.timeout_s)));
  HealthCheckResponse response;
  MK_RETURN_IF_ERROR(
      Annotate(rpc::ToAbsl(stub->Check(&context, HealthCheckRequest(), &response)), flags.grpc));
  if (response.status() == HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::UnavailableError(StrCat(flags.grpc, ": expected SERVING, found ",
                                       HealthCheckResponse::ServingStatus_Name(response.status())));
}

}  // namespace

void AddHealthFlags(CLI::App& app, HealthFlags& flags) {
  CLI::Option* url = app.add_option("--url", flags.url,
                                    "what a GET has to answer with 200; without a path: a gateway's /health");
  app.add_option("--grpc", flags.grpc, "HOST:PORT of any member's gRPC server")->excludes(url);
  app.add_option("--name", flags.name, "https: name that its certificate is valid for (default: the host)");
  app.add_option("--pin", flags.pin,
                 "https: the very certificate that the server shows, whatever its name; instead of --ca")
      ->needs(url);
  AddClientTlsFlags(app, flags.tls);
  app.add_option("--timeout-s", flags.timeout_s)->check(CLI::Range(1, 600))->capture_default_str();
}

absl::Status RunHealth(const HealthFlags& flags) {
  if (!flags.url.empty()) return AskHttp(flags);
  if (!flags.grpc.empty()) return AskGrpc(flags);
  return absl::InvalidArgumentError("health: expected --url or --grpc, found neither");
}

}  // namespace minke::cli
