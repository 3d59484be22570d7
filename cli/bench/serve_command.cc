#include "cli/bench/serve_command.h"

#include <sys/resource.h>
#include <unistd.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <exception>
#include <iostream>

#include "absl/strings/str_format.h"
#include "cli/api_key.h"
#include "cli/bench/json_output.h"
#include "cli/bench/report.h"
#include "cli/bench/stream_client.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

namespace asio = boost::asio;

constexpr std::chrono::seconds kModelsTimeout{10};
constexpr size_t kModelsBytesMax = 16 << 20;
constexpr int kOtherFiles = 32;  // standard streams, epoll, timers, libraries

// As many sockets as the plan can have open at once.
absl::Status AllowSockets(int count) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlim_t needed = static_cast<rlim_t>(count) + kOtherFiles;
  if (limit.rlim_cur >= needed) return absl::OkStatus();
  if (limit.rlim_max < needed) {
    return absl::ResourceExhaustedError(
        StrCat(count, " requests at once need ", needed, " open files, and only ", limit.rlim_max,
               " are allowed (ulimit -Hn); take less of --concurrency or --concurrency-max"));
  }
  limit.rlim_cur = needed;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
    return absl::ResourceExhaustedError("cannot raise the limit of open files");
  return absl::OkStatus();
}

// The id of the first model the server lists.
absl::StatusOr<std::string> FirstModel(asio::io_context& context, StreamClient& client, const Url& url) {
  const std::string path = "/models", nothing;
  std::string body;
  Exchange exchange;
  const auto take = [&](int, std::string_view piece) {
    body.append(piece);
    return body.size() < kModelsBytesMax ? Verdict::kMore : Verdict::kGiveUp;
  };
  const StreamClient::BodyFunction on_body = take;
  asio::co_spawn(
      context,
      [&]() -> asio::awaitable<void> {
        exchange = co_await client.Send(path, nothing, Clock::now() + kModelsTimeout, on_body);
      },
      [](std::exception_ptr failure) {
        if (failure) std::rethrow_exception(failure);
      });
  context.restart();
  context.run();
  const std::string where = StrCat(url.Base(), path);
  if (exchange.ending == Ending::kTimeout)
    return absl::DeadlineExceededError(StrCat(where, ": no answer within ", kModelsTimeout.count(), " s"));
  if (exchange.ending != Ending::kWhole)
    return absl::UnavailableError(StrCat("cannot reach ", where, ": ", exchange.detail));
  if (exchange.status != 200)
    return absl::FailedPreconditionError(StrCat(where, ": ", exchange.status, " ", ErrorText(body)));
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
  const nlohmann::json::json_pointer id("/data/0/id");
  if (json.is_object() && json.contains(id) && json[id].is_string()) return json[id].get<std::string>();
  return absl::FailedPreconditionError(StrCat(where, ": lists no model; choose one by --model"));
}

struct CpuTime {
  double user_s, system_s;
};
CpuTime CpuTimeSoFar() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return {seconds(usage.ru_utime), seconds(usage.ru_stime)};
}

// One line on a terminal, written over every second; nothing elsewhere.
class ProgressLine {
 public:
  ~ProgressLine() { Clear(); }
  void Show(const char* phase, const LoadPlan& plan, const LoadState& state) {
    if (!terminal_) return;
    const std::string all = plan.requests_max ? StrCat(" of ", *plan.requests_max) : "";
    const double elapsed_s = std::chrono::duration<double>(state.elapsed).count();
    std::cerr << absl::StrFormat(
                     "\r\x1b[K%s %.0f s: %d%s completed, %d failed, %d under way, %.0f output events/s",
                     phase, elapsed_s, state.completed, all, state.failed, state.under_way,
                     static_cast<double>(state.output_events - last_events_) /
                         std::chrono::duration<double>(kProgressInterval).count())
              << std::flush;
    last_events_ = state.output_events;
    shown_ = true;
  }
  void Clear() {
    if (shown_) std::cerr << "\r\x1b[K" << std::flush;
    shown_ = false;
    last_events_ = 0;
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  bool shown_ = false;
  int64_t last_events_ = 0;
};

// The most frequent error, as a message.
std::string WorstError(const RunStatistics& statistics) {
  const RunStatistics::Errors* worst = nullptr;
  std::string text;
  for (const auto& [kind, errors] : statistics.errors) {
    if (worst != nullptr && errors.count <= worst->count) continue;
    worst = &errors;
    text = StrCat(kind, ": ", errors.example);
  }
  return text;
}

absl::Status WarmUp(asio::io_context& context, StreamClient& client, const ServeFlags& flags,
                    const RequestSource& source, const std::string& model, ProgressLine& progress) {
  const LoadPlan plan = ToWarmupPlan(flags);
  RunStatistics statistics;
  const LoadResult result = RunLoad(
      context, client, plan, [&](int64_t index) { return source.Make(-1 - index, model); },
      [&](const RequestRecord& record) { statistics.Add(record); },
      [&](const LoadState& state) { progress.Show("warm-up", plan, state); });
  progress.Clear();
  if (result.interrupted) return absl::CancelledError("interrupted in the warm-up");
  if (statistics.completed == 0)
    return absl::UnavailableError(
        StrCat("all ", statistics.failed, " requests of the warm-up failed: ", WorstError(statistics)));
  return absl::OkStatus();
}

absl::Status Write(const ServeReport& report, std::ostream& out) {
  const std::string& json = report.flags.json;
  TableStream(json, out) << FormatTable(report) << std::flush;
  return json.empty() ? absl::OkStatus() : WriteJson(json, FormatJson(report), out);
}

absl::Status ExitStatus(const ServeReport& report) {
  const RunStatistics& s = report.statistics;
  if (s.completed == 0 && s.failed == 0)
    return absl::CancelledError("interrupted before any request was completed");
  if (s.completed == 0)
    return absl::UnavailableError(StrCat("all ", s.failed, " requests failed: ", WorstError(s)));
  if (s.failed > 0 && report.flags.fail_on_error)
    return absl::UnavailableError(
        StrCat(s.failed, " of ", s.failed + s.completed, " requests failed: ", WorstError(s)));
  return absl::OkStatus();
}

}  // namespace

absl::Status RunServe(const ServeFlags& flags, const std::string& version, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const Endpoint endpoint, ServeEndpoint(flags));
  MK_ASSIGN_OR_RETURN(const std::string api_key, FirstKey(flags.api_key_file));
  MK_ASSIGN_OR_RETURN(RequestOptions options, ToRequestOptions(flags));
  MK_ASSIGN_OR_RETURN(const RequestSource source, RequestSource::Create(std::move(options)));
  const LoadPlan plan = ToLoadPlan(flags);
  MK_RETURN_IF_ERROR(AllowSockets(plan.concurrency));
  MK_RETURN_IF_ERROR(CheckWritable(flags.json));

  asio::io_context context(1);  // this thread alone
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<StreamClient> client,
                      StreamClient::Create(context, endpoint, api_key));
  ServeReport report{.version = version, .flags = flags, .model = flags.model};
  if (report.model.empty()) {
    MK_ASSIGN_OR_RETURN(report.model, FirstModel(context, *client, endpoint.url));
  }
  ProgressLine progress;
  if (flags.warmup > 0) MK_RETURN_IF_ERROR(WarmUp(context, *client, flags, source, report.model, progress));

  const CpuTime before = CpuTimeSoFar();
  const LoadResult result = RunLoad(
      context, *client, plan, [&](int64_t index) { return source.Make(index, report.model); },
      [&](const RequestRecord& record) { report.statistics.Add(record); },
      [&](const LoadState& state) { progress.Show("run", plan, state); });
  const CpuTime after = CpuTimeSoFar();
  progress.Clear();
  report.state = result.state;
  report.interrupted = result.interrupted;
  report.cpu_user_s = after.user_s - before.user_s;
  report.cpu_system_s = after.system_s - before.system_s;
  report.connections_opened = client->connections_opened();
  MK_RETURN_IF_ERROR(Write(report, out));
  return ExitStatus(report);
}

}  // namespace minke::cli::bench
