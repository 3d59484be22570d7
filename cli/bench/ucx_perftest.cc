#include "cli/bench/ucx_perftest.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::cli::bench {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);
constexpr absl::Duration kRetry = absl::Milliseconds(50);
constexpr int64_t kIterationsMin = 100, kIterationsMax = 100'000'000;

// A port that was free a moment ago.
absl::StatusOr<int> FreePort() {
  const int fd = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int fallback = fd < 0 ? ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
  const int socket_fd = fd < 0 ? fallback : fd;
  sockaddr_in6 address{};  // large enough for both; port 0 of any address
  address.sin6_family = fd < 0 ? AF_INET : AF_INET6;
  socklen_t length = fd < 0 ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  const bool ok =
      socket_fd >= 0 && ::bind(socket_fd, raw, length) == 0 && ::getsockname(socket_fd, raw, &length) == 0;
  if (socket_fd >= 0) ::close(socket_fd);
  if (!ok) return absl::UnavailableError("no free port for ucx_perftest");
  return ntohs(address.sin6_port);  // where sin_port is, too
}

int64_t Iterations(double count) {
  return std::isfinite(count)
             ? std::clamp(static_cast<int64_t>(std::min(count, 1e9)), kIterationsMin, kIterationsMax)
             : kIterationsMin;
}

}  // namespace

// Of what the client writes with -f -v: iterations,percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,...
absl::StatusOr<UcxPerftest::Line> UcxPerftest::ParseLine(const std::string& text) {
  Line result;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<std::string> fields = absl::StrSplit(line, ',');
    if (fields.size() >= 6 && absl::SimpleAtod(fields[1], &result.percentile_us) &&
        absl::SimpleAtod(fields[5], &result.mib_per_s)) {
      return result;
    }
  }
  return absl::UnavailableError(StrCat("ucx_perftest: expected a line of numbers, found ", LastLine(text)));
}

absl::StatusOr<UcxPerftest> UcxPerftest::Create(std::string host, Variables settings) {
  MK_ASSIGN_OR_RETURN(std::string program, FindProgram("ucx_perftest"));
  return UcxPerftest(std::move(program), std::move(host), std::move(settings));
}

absl::StatusOr<UcxPerftest::Line> UcxPerftest::Run(const std::string& test, uint32_t bytes,
                                                   int64_t iterations, int percentile) {
  const absl::Time deadline = absl::Now() + kTimeout;
  MK_ASSIGN_OR_RETURN(const int port, FreePort());
  std::vector<std::string> server_arguments = {"-p", StrCat(port)};
  if (host_.find(':') != std::string::npos) server_arguments.push_back("-6");
  MK_ASSIGN_OR_RETURN(Subprocess server, Subprocess::Start(program_, server_arguments, settings_));
  std::vector<std::string> arguments = {host_};
  arguments.insert(arguments.end(), server_arguments.begin(), server_arguments.end());
  // -e: endpoints with error handling, as ours are; -f -v: one line of CSV.
  for (const std::string& argument :
       {std::string("-t"), test, std::string("-s"), StrCat(bytes), std::string("-n"), StrCat(iterations),
        std::string("-w"), StrCat(iterations / 10), std::string("-R"), StrCat(percentile), std::string("-e"),
        std::string("-f"), std::string("-v")}) {
    arguments.push_back(argument);
  }
  absl::StatusOr<Line> line = absl::UnavailableError("ucx_perftest: its server ended at once");
  while (server.Running()) {  // the client gives up at once if the server does not listen yet
    absl::SleepFor(kRetry);
    MK_ASSIGN_OR_RETURN(Subprocess client, Subprocess::Start(program_, arguments, settings_));
    const absl::StatusOr<std::string> text = client.Finish(deadline);
    line = text.ok() ? ParseLine(*text) : text.status();
    if (line.ok() || absl::IsDeadlineExceeded(line.status())) break;
  }
  return line;
}

absl::StatusOr<UcxPerftest::RoundTrips> UcxPerftest::MeasureRoundTrips(uint32_t bytes, absl::Duration time,
                                                                       absl::Duration round_trip) {
  RoundTrips result;
  const int64_t iterations = Iterations(absl::FDivDuration(time, round_trip) / 2);
  for (const auto& [percentile, out] : {std::pair(50, &result.p50_us), std::pair(99, &result.p99_us)}) {
    MK_ASSIGN_OR_RETURN(const Line line, Run("ucp_am_lat", bytes, iterations, percentile));
    *out = 2 * line.percentile_us;
  }
  return result;
}

absl::StatusOr<double> UcxPerftest::MeasureBandwidth(uint32_t bytes, absl::Duration time,
                                                     double bytes_per_s) {
  const double count = absl::ToDoubleSeconds(time) * bytes_per_s / bytes;
  MK_ASSIGN_OR_RETURN(const Line line, Run("ucp_am_bw", bytes, Iterations(count), 50));
  return line.mib_per_s * (1 << 20);
}

}  // namespace minke::cli::bench
