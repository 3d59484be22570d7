#include "cli/bench/load.h"

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <csignal>
#include <exception>
#include <list>

#include "libs/base/status.h"

namespace minke::cli::bench {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);

// A worker whose request failed rests: a server that refuses everything would otherwise cost a whole core,
// which it may need itself to come back.
constexpr std::chrono::milliseconds kRestAfterFailure{20};
constexpr size_t kErrorBodyBytesMax = 64 << 10;

// The coroutines keep to named objects in co_await expressions: GCC 12 destroys temporaries there twice.
class Load {
 public:
  Load(asio::io_context& context, StreamClient& client, const LoadPlan& plan,
       const std::function<Request(int64_t)>& make_request,
       const std::function<void(const RequestRecord&)>& on_record,
       const std::function<void(const LoadState&)>& on_progress)
      : context_(context),
        client_(client),
        plan_(plan),
        make_request_(make_request),
        on_record_(on_record),
        on_progress_(on_progress),
        signals_(context, SIGINT, SIGTERM),
        progress_timer_(context),
        wake_arrivals_(context) {}

  LoadResult Run();

 private:
  template <typename Coroutine>
  void Spawn(Coroutine coroutine) {
    ++coroutines_;
    asio::co_spawn(context_, std::move(coroutine), [this](std::exception_ptr failure) {
      if (failure) std::rethrow_exception(failure);  // ours: nothing in here throws by design
      if (--coroutines_ > 0) return;
      error_code ignored;
      signals_.cancel(ignored);
      progress_timer_.cancel();
    });
  }
  asio::awaitable<void> Worker();
  asio::awaitable<void> Arrivals();
  asio::awaitable<void> Perform(int64_t index, Clock::time_point scheduled);
  asio::awaitable<void> Rest();
  void Finish(RequestRecord& record, const Exchange& exchange, const std::string& error_body);
  void Account(const RequestRecord& record);
  void Interrupt();
  void Progress();

  bool MayBegin(Clock::time_point at) const {
    return !interrupted_ && (!plan_.requests_max || state_.started < *plan_.requests_max) &&
           (!plan_.duration_max || at - begin_ < *plan_.duration_max);
  }

  asio::io_context& context_;
  StreamClient& client_;
  const LoadPlan& plan_;
  const std::function<Request(int64_t)>& make_request_;
  const std::function<void(const RequestRecord&)>& on_record_;
  const std::function<void(const LoadState&)>& on_progress_;

  asio::signal_set signals_;
  asio::steady_timer progress_timer_;
  asio::steady_timer wake_arrivals_;  // the next arrival, or (cancelled) a free place, or the end
  std::list<asio::steady_timer> resting_;
  Clock::time_point begin_, last_end_;
  LoadState state_;
  bool interrupted_ = false;
  int coroutines_ = 0;
};

LoadResult Load::Run() {
  begin_ = last_end_ = Clock::now();
  signals_.async_wait([this](error_code error, int) {
    if (!error) Interrupt();
  });
  Progress();
  if (plan_.rate_per_s) {
    Spawn([this] { return Arrivals(); });
  } else {
    for (int i = 0; i < plan_.concurrency; ++i) Spawn([this] { return Worker(); });
  }
  context_.restart();
  context_.run();
  state_.elapsed = last_end_ - begin_;
  return {.state = state_, .interrupted = interrupted_};
}

asio::awaitable<void> Load::Worker() {
  while (MayBegin(Clock::now())) {
    const int64_t failed_before = state_.failed, index = state_.started++;
    co_await Perform(index, Clock::now());
    if (state_.failed > failed_before) co_await Rest();
  }
}

asio::awaitable<void> Load::Arrivals() {
  ArrivalProcess process(plan_.arrival, *plan_.rate_per_s, plan_.seed);
  for (;;) {
    const Clock::time_point due = begin_ + process.Next();
    if (!MayBegin(due)) break;
    while (!interrupted_ && Clock::now() < due) {
      wake_arrivals_.expires_at(due);
      co_await wake_arrivals_.async_wait(kToken);
    }
    // However far behind the arrivals are, the run ends on time.
    const Clock::time_point last =
        plan_.duration_max ? begin_ + *plan_.duration_max : Clock::time_point::max();
    while (!interrupted_ && state_.under_way >= plan_.concurrency && Clock::now() < last) {
      wake_arrivals_.expires_at(last);
      co_await wake_arrivals_.async_wait(kToken);
    }
    if (interrupted_) break;
    if (Clock::now() >= last) {
      ++state_.not_sent;
      continue;
    }
    const int64_t index = state_.started++;
    Spawn([this, index, due] { return Perform(index, due); });
  }
}

asio::awaitable<void> Load::Perform(int64_t index, Clock::time_point scheduled) {
  ++state_.under_way;
  state_.under_way_max = std::max(state_.under_way_max, state_.under_way);
  const Request request = make_request_(index);
  RequestRecord record{
      .scheduled = scheduled, .sent = Clock::now(), .prompt_tokens_asked = request.prompt_tokens};
  std::string error_body;
  const auto on_body = [&](int status, std::string_view piece) {
    if (status != 200) {
      error_body.append(piece.substr(0, kErrorBodyBytesMax - error_body.size()));
      return error_body.size() < kErrorBodyBytesMax ? Verdict::kMore : Verdict::kGiveUp;
    }
    const int64_t events_before = record.answer.output_events();
    record.end = Clock::now();
    record.answer.Feed(piece, record.end);
    state_.output_events += record.answer.output_events() - events_before;
    if (!record.answer.failure().empty()) return Verdict::kGiveUp;
    return record.answer.done() ? Verdict::kEnough : Verdict::kMore;
  };
  const Clock::time_point deadline = record.sent + plan_.timeout;
  const Exchange exchange = co_await client_.Send(request.path, request.body, deadline, on_body);
  Finish(record, exchange, error_body);
  on_record_(record);
  --state_.under_way;
  wake_arrivals_.cancel();  // a place is free
}

// Judges the request.
void Load::Finish(RequestRecord& record, const Exchange& exchange, const std::string& error_body) {
  AnswerReader& answer = record.answer;
  const auto fail = [&](std::string kind, std::string text) {
    record.outcome = Outcome::kFailed;
    record.error_kind = std::move(kind);
    record.error_text = std::move(text);
  };
  const bool done = exchange.status == 200 && answer.done();
  if (!done) record.end = Clock::now();
  const bool refused = exchange.status != 0 && exchange.status != 200;
  if (refused && (exchange.ending == Ending::kWhole || exchange.ending == Ending::kBroken)) {
    fail(StrCat("http_", exchange.status), ErrorText(error_body));
    return Account(record);
  }
  switch (exchange.ending) {
    case Ending::kWhole:
      answer.Finish(record.end);
      if (answer.whole()) {
        record.outcome = Outcome::kCompleted;
      } else {
        fail(answer.failure_is_error_event() ? "error_event" : "broken_stream", answer.failure());
      }
      break;
    case Ending::kRefused:
      fail("connection_refused", exchange.detail);
      break;
    case Ending::kConnectFailed:
      fail("connect_failed", exchange.detail);
      break;
    case Ending::kTimeout:
      fail("timeout", StrCat(exchange.status == 0 ? "no answer" : "no end of the answer", " within ",
                             std::chrono::duration<double>(plan_.timeout).count(), " s"));
      break;
    case Ending::kBroken:
      fail("broken_stream", exchange.detail);
      break;
    case Ending::kCancelled:
      record.outcome = Outcome::kInterrupted;
      break;
  }
  Account(record);
}

void Load::Account(const RequestRecord& record) {
  state_.completed += record.outcome == Outcome::kCompleted;
  state_.failed += record.outcome == Outcome::kFailed;
  state_.interrupted += record.outcome == Outcome::kInterrupted;
  last_end_ = std::max(last_end_, record.end);
}

asio::awaitable<void> Load::Rest() {
  if (interrupted_) co_return;
  const auto timer = resting_.emplace(resting_.end(), context_, kRestAfterFailure);
  co_await timer->async_wait(kToken);
  resting_.erase(timer);
}

void Load::Interrupt() {
  interrupted_ = true;
  client_.CancelAll();
  wake_arrivals_.cancel();
  for (asio::steady_timer& timer : resting_) timer.cancel();
}

void Load::Progress() {
  progress_timer_.expires_after(kProgressInterval);
  progress_timer_.async_wait([this](error_code error) {
    // A handler that was on its way when the last coroutine ended cannot be cancelled any more.
    if (error || coroutines_ == 0) return;
    state_.elapsed = Clock::now() - begin_;
    on_progress_(state_);
    Progress();
  });
}

}  // namespace

LoadResult RunLoad(asio::io_context& context, StreamClient& client, const LoadPlan& plan,
                   const std::function<Request(int64_t)>& make_request,
                   const std::function<void(const RequestRecord&)>& on_record,
                   const std::function<void(const LoadState&)>& on_progress) {
  MK_CHECK(plan.requests_max || plan.duration_max);
  return Load(context, client, plan, make_request, on_record, on_progress).Run();
}

}  // namespace minke::cli::bench
