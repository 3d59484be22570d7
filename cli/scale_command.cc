#include "cli/scale_command.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "cli/http_client.h"
#include "cli/operator_socket.h"
#include "cli/pool.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli {
namespace {

constexpr absl::Duration kLook = absl::Milliseconds(50);
// `minke up` may notice that it is ready a moment after its clients do.
constexpr absl::Duration kJustReady = absl::Seconds(1);

std::string NamesOf(const google::protobuf::RepeatedPtrField<cluster::v1::Child>& children) {
  std::vector<const cluster::v1::Child*> pointers;
  for (const cluster::v1::Child& child : children) pointers.push_back(&child);
  return Names(pointers);
}

// Why it is not over; empty: it is. An error: it will not be.
absl::StatusOr<std::string> LookOnce(OperatorClient& client, const cluster::v1::ScaleAnswer& scaled) {
  const auto status = client.Status();
  if (!status.ok()) return Annotate(status.status(), "the cluster has ended meanwhile");
  MK_ASSIGN_OR_RETURN(const std::string left, WhatIsLeft(scaled, *status));
  if (!left.empty()) return left;
  const cluster::v1::HttpTls& tls = status->http_tls();
  const Url url{.host = status->http_host(), .port = status->http_port(), .tls = status->has_http_tls()};
  const auto gateway =
      ToOwnGateway(url, tls.certificate_file(),
                   {{"certificate", tls.client_certificate_file()}, {"key", tls.client_key_file()}});
  if (!gateway.ok()) return std::string(gateway.status().message());
  const auto health = HttpGet(*gateway, "/health", absl::Seconds(2));
  if (!health.ok()) return std::string(health.status().message());
  return health->status == 200 ? "" : StrCat("/health: ", health->status, " ", health->body);
}

absl::Status Wait(OperatorClient& client, const cluster::v1::ScaleAnswer& scaled, int deadline_s) {
  const absl::Time end = absl::Now() + absl::Seconds(deadline_s);
  while (true) {
    MK_ASSIGN_OR_RETURN(std::string left, LookOnce(client, scaled));
    if (left.empty()) return absl::OkStatus();
    if (absl::Now() >= end) {
      std::replace(left.begin(), left.end(), '\n', ' ');
      return absl::DeadlineExceededError(StrCat("not over after ", deadline_s, " s: ", left));
    }
    absl::SleepFor(kLook);
  }
}

}  // namespace

void AddScaleFlags(CLI::App& app, ScaleFlags& flags) {
  app.add_option("POOL", flags.pool, "experts, attention or routers")->required();
  app.add_option("COUNT", flags.count, "processes there are to be")->required();
  app.add_option("--port", flags.port, "HTTP port of the cluster")
      ->check(CLI::Range(1, 65535))
      ->capture_default_str();
  app.add_flag("--wait,!--no-wait", flags.wait,
               "until new processes serve, drained ones have ended, and /health is 200 (default)");
  app.add_option("--deadline-s", flags.deadline_s, "how long to wait")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
}

absl::Status RunScale(const ScaleFlags& flags, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const Role role, ParsePool(flags.pool));
  // What the cluster would refuse in any case, said also where there is none.
  MK_RETURN_IF_ERROR(PlanScale({}, role, flags.count, {.etcd = true, .replicas = 1}).status());
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<OperatorClient> client, OperatorClient::Connect(flags.port));
  const absl::Time begin = absl::Now();
  const absl::Duration patience = flags.wait ? absl::Seconds(flags.deadline_s) : kJustReady;
  auto answer = client->Scale(role, static_cast<int>(flags.count));
  while (absl::IsFailedPrecondition(answer.status()) && absl::Now() - begin < patience) {
    absl::SleepFor(kLook);
    answer = client->Scale(role, static_cast<int>(flags.count));
  }
  MK_ASSIGN_OR_RETURN(const cluster::v1::ScaleAnswer scaled, std::move(answer));
  out << flags.pool << ": " << scaled.before() << " -> " << flags.count;
  if (scaled.started_size() > 0) out << ", started " << NamesOf(scaled.started());
  if (scaled.draining_size() > 0) out << ", draining " << NamesOf(scaled.draining());
  if (scaled.started_size() + scaled.draining_size() == 0) out << ", nothing to do";
  out << std::endl;
  if (!flags.wait) return absl::OkStatus();
  MK_RETURN_IF_ERROR(Wait(*client, scaled, flags.deadline_s));
  out << absl::StrFormat("ready after %.1f s\n", absl::ToDoubleSeconds(absl::Now() - begin));
  return absl::OkStatus();
}

}  // namespace minke::cli
