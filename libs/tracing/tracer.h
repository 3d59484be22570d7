// Takes finished spans of this process and sends them to an OpenTelemetry collector: OTLP over HTTP, in
// binary protobuf, in batches, from a thread of its own (docs/tracing.md). Nobody waits for it: when the
// collector is slow or away, spans are dropped and counted.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "libs/base/mutex.h"
#include "libs/telemetry/page.h"
#include "libs/tracing/http_post.h"
#include "libs/tracing/span.h"

namespace minke::tracing {

struct TracerOptions {
  // http://HOST:PORT[/path]; /v1/traces is appended, as OTEL_EXPORTER_OTLP_ENDPOINT has it. Empty: no traces.
  std::string endpoint;
  std::string service;            // service.name: "minke-gateway"
  std::string instance;           // service.instance.id: the node's id
  size_t queue_spans_max = 8192;  // beyond them: dropped
  size_t batch_spans_max = 512;
  std::chrono::milliseconds batch_wait{1000};  // how long the first span of a batch waits for others
  std::chrono::milliseconds timeout{5000};     // of one request to the collector
};

struct TracerCounters {
  uint64_t sent = 0, dropped = 0;  // spans; dropped: the queue was full, or the collector did not take them
};

// Thread-safe.
class Tracer {
 public:
  // Null without an endpoint. INVALID_ARGUMENT: not such an address. Whether anybody listens there is found
  // out later, and logged.
  static absl::StatusOr<std::unique_ptr<Tracer>> Start(TracerOptions options);
  ~Tracer();  // sends what it has, for at most one timeout
  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  // Never blocks. REQUIRES: the span belongs to a sampled trace.
  void Record(Span span);
  TracerCounters counters() const;
  void Collect(telemetry::Page& page) const;

 private:
  Tracer(TracerOptions options, HttpEndpoint endpoint);
  void Run();
  void Send(std::vector<Span> batch);

  const TracerOptions options_;
  const HttpEndpoint endpoint_;
  std::atomic<uint64_t> sent_{0}, dropped_{0};
  bool failing_ = false;  // of the thread
  mutable Mutex mutex_;
  std::vector<Span> queue_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// Which requests are traced: a share of those whose client does not say; else as the client says.
class Sampler {
 public:
  explicit Sampler(double ratio) : ratio_(ratio) {}
  // The context in which a request's own span is the root or the client's child.
  SpanContext Sample(std::string_view traceparent) const;

 private:
  double ratio_;
};

}  // namespace minke::tracing
