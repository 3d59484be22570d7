#include "libs/tracing/tracer.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/tracing/otlp.h"

namespace minke::tracing {
namespace {

constexpr char kTag[] = "tracing";
constexpr std::chrono::milliseconds kSecondTry{500};

}  // namespace

absl::StatusOr<std::unique_ptr<Tracer>> Tracer::Start(TracerOptions options) {
  if (options.endpoint.empty()) return std::unique_ptr<Tracer>();
  MK_ASSIGN_OR_RETURN(HttpEndpoint endpoint, ParseEndpoint(options.endpoint));
  log::Info(kTag, "sending traces", {{"collector", options.endpoint}});
  return std::unique_ptr<Tracer>(new Tracer(std::move(options), std::move(endpoint)));
}

Tracer::Tracer(TracerOptions options, HttpEndpoint endpoint)
    : options_(std::move(options)), endpoint_(std::move(endpoint)), thread_([this] { Run(); }) {}

Tracer::~Tracer() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  thread_.join();
}

void Tracer::Record(Span span) {
  const MutexLock lock(mutex_);
  if (queue_.size() >= options_.queue_spans_max) {
    dropped_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  queue_.push_back(std::move(span));
}

TracerCounters Tracer::counters() const { return {sent_.load(), dropped_.load()}; }

void Tracer::Collect(telemetry::Page& page) const {
  const auto count = [&](const char* result, const std::atomic<uint64_t>& spans) {
    page.Counter("minke:trace_spans_total", "Spans of sampled requests, by what became of them",
                 static_cast<double>(spans.load()), {{"service", options_.service}, {"result", result}});
  };
  count("sent", sent_);
  count("dropped", dropped_);
}

void Tracer::Run() {
  SetThreadName("tracing");
  while (true) {
    std::vector<Span> batch;
    bool stop = false;
    {
      const MutexLock lock(mutex_);
      mutex_.Await([this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stop_ || !queue_.empty(); });
      mutex_.AwaitFor(absl::FromChrono(options_.batch_wait), [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stop_ || queue_.size() >= options_.batch_spans_max;
      });
      stop = stop_;
      const size_t count = std::min(queue_.size(), options_.batch_spans_max);
      batch.assign(std::move_iterator(queue_.begin()),
                   std::move_iterator(queue_.begin() + static_cast<ptrdiff_t>(count)));
      queue_.erase(queue_.begin(), queue_.begin() + static_cast<ptrdiff_t>(count));
    }
    if (!batch.empty()) Send(std::move(batch));
    if (!stop) continue;
    const MutexLock lock(mutex_);
    if (failing_) {  // nobody is there: the rest would only cost a timeout each
      dropped_.fetch_add(queue_.size());
      queue_.clear();
    }
    if (queue_.empty()) return;
  }
}

void Tracer::Send(std::vector<Span> batch) {
  const std::string body = ToOtlp(batch, options_.service, options_.instance);
  absl::Status status;
  for (int attempt = 0; attempt < 2; ++attempt) {
    status = Post(endpoint_, "application/x-protobuf", body, options_.timeout);
    // A collector that is away stays away for more than a moment: one more try, and only for the first batch.
    if (!absl::IsUnavailable(status) || failing_) break;
    if (attempt == 0) absl::SleepFor(absl::FromChrono(kSecondTry));
  }
  (status.ok() ? sent_ : dropped_).fetch_add(batch.size());
  if (status.ok() == !failing_) return;
  failing_ = !status.ok();
  if (status.ok()) {
    log::Info(kTag, "the collector takes spans again");
  } else {
    log::Warning(kTag, StrCat("the collector takes no spans: ", status.message()),
                 {{"collector", options_.endpoint}});
  }
}

SpanContext Sampler::Sample(std::string_view traceparent) const {
  if (const auto from_client = ParseTraceparent(traceparent)) return *from_client;
  static thread_local std::minstd_rand random{std::random_device{}()};
  const double drawn = std::uniform_real_distribution<double>(0, 1)(random);
  return {.trace = NewTraceId(), .span = 0, .sampled = drawn < ratio_};
}

}  // namespace minke::tracing
