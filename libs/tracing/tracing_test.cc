#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <mutex>
#include <thread>

#include "gtest/gtest.h"
#include "libs/tracing/http_post.h"
#include "libs/tracing/otlp.h"
#include "libs/tracing/tracer.h"
#include "proto/otlp/trace.pb.h"

namespace minke::tracing {
namespace {

constexpr char kTraceparent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

// Answers every request with a status, or not at all.
class Collector {
 public:
  explicit Collector(int status) : status_(status), listener_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    EXPECT_EQ(::bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(::listen(listener_, 16), 0);
    ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~Collector() {
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    ::close(listener_);
  }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  std::vector<std::string> requests() const {
    const std::lock_guard lock(mutex_);
    return requests_;
  }

 private:
  void Run() {
    for (int fd; (fd = ::accept(listener_, nullptr, nullptr)) >= 0; ::close(fd)) {
      std::string request;
      char piece[4096];
      while (!Whole(request)) {
        const ssize_t bytes = ::recv(fd, piece, sizeof piece, 0);
        if (bytes <= 0) break;
        request.append(piece, static_cast<size_t>(bytes));
      }
      {
        const std::lock_guard lock(mutex_);
        requests_.push_back(request);
      }
      if (status_ == 0) {
        ::recv(fd, piece, sizeof piece, 0);  // until the client gives up
        continue;
      }
      const std::string answer = "HTTP/1.1 " + std::to_string(status_) + " X\r\nContent-Length: 0\r\n\r\n";
      (void)::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL);
    }
  }
  static bool Whole(const std::string& request) {
    const size_t head = request.find("\r\n\r\n"), length = request.find("Content-Length: ");
    return head != std::string::npos && length != std::string::npos &&
           request.size() >= head + 4 + std::stoul(request.substr(length + 16));
  }

  const int status_, listener_;
  uint16_t port_ = 0;
  mutable std::mutex mutex_;
  std::vector<std::string> requests_;  // guarded by mutex_
  std::thread thread_;
};

Span MakeSpan() {
  return {.trace = NewTraceId(),
          .id = NewSpanId(),
          .parent = 7,
          .name = "decode",
          .kind = SpanKind::kServer,
          .begin = Time(std::chrono::seconds(1'700'000'000)),
          .end = Time(std::chrono::seconds(1'700'000'001)),
          .attributes = {{"text", std::string("a")},
                         {"number", int64_t{-3}},
                         {"real", 0.5},
                         {"truth", true},
                         {"list", std::vector<std::string>{"x", "y"}}}};
}

TEST(Traceparent, IsReadAndWritten) {
  const auto context = ParseTraceparent(kTraceparent);
  ASSERT_TRUE(context);
  EXPECT_EQ(context->span, 0x00f067aa0ba902b7u);
  EXPECT_TRUE(context->sampled);
  EXPECT_EQ(FormatTraceparent(*context), kTraceparent);
  EXPECT_FALSE(ParseTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02")->sampled);
  // A later version may say more.
  EXPECT_TRUE(ParseTraceparent("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what"));
}

TEST(Traceparent, WhatIsNoneStartsNoTrace) {
  const std::string good = kTraceparent;
  for (const std::string& bad :
       {std::string(), std::string("00"), good.substr(0, 54), good + "0", good + "-x", "ff" + good.substr(2),
        "0g" + good.substr(2), good.substr(0, 3) + std::string(32, '0') + good.substr(35),
        good.substr(0, 36) + std::string(16, '0') + good.substr(52),
        good.substr(0, 35) + "_" + good.substr(36),
        std::string("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01")}) {
    EXPECT_FALSE(ParseTraceparent(bad)) << bad;
  }
}

TEST(Sampler, FollowsTheClientElseTheRatio) {
  EXPECT_TRUE(Sampler(0).Sample(kTraceparent).sampled);
  EXPECT_FALSE(Sampler(1).Sample("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").sampled);
  int sampled = 0;
  for (int i = 0; i < 4000; ++i) sampled += Sampler(0.25).Sample("").sampled;
  EXPECT_GT(sampled, 800);
  EXPECT_LT(sampled, 1200);
  EXPECT_FALSE(Sampler(0).Sample("").sampled);
  EXPECT_TRUE(Sampler(1).Sample("nonsense").sampled);
}

TEST(Endpoint, IsReadAsOpenTelemetrySays) {
  const auto parsed = ParseEndpoint("http://collector:4318");
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->host, "collector");
  EXPECT_EQ(parsed->port, "4318");
  EXPECT_EQ(parsed->path, "/v1/traces");
  EXPECT_EQ(ParseEndpoint("http://c/otlp/")->path, "/otlp/v1/traces");
  EXPECT_EQ(ParseEndpoint("http://c")->port, "4318");
  EXPECT_EQ(ParseEndpoint("http://[::1]:9")->host, "::1");
  for (const char* bad : {"", "collector:4318", "https://c:1", "http://", "http://:1",
                          "http://c:", "http://c:x", "http://c:123456", "http://c d", "http://[::1"}) {
    const auto refused = ParseEndpoint(bad);
    ASSERT_FALSE(refused.ok()) << bad;
    EXPECT_NE(refused.status().message().find("expected http://HOST"), std::string::npos);
  }
}

TEST(Otlp, HasEveryField) {
  const Span span = MakeSpan();
  Span failed = MakeSpan();
  failed.failed = true;
  failed.error = "why";
  failed.parent = 0;
  const Span spans[] = {span, failed};
  otlp::v1::ExportTraceServiceRequest request;
  ASSERT_TRUE(request.ParseFromString(ToOtlp(spans, "minke-test", "0001")));
  ASSERT_EQ(request.resource_spans_size(), 1);
  const auto& resource = request.resource_spans(0);
  EXPECT_EQ(resource.resource().attributes(0).key(), "service.name");
  EXPECT_EQ(resource.resource().attributes(0).value().string_value(), "minke-test");
  ASSERT_EQ(resource.scope_spans(0).spans_size(), 2);
  const auto& first = resource.scope_spans(0).spans(0);
  EXPECT_EQ(first.trace_id(), std::string(span.trace.begin(), span.trace.end()));
  EXPECT_EQ(first.span_id().size(), 8u);
  EXPECT_EQ(first.parent_span_id(), std::string("\0\0\0\0\0\0\0\7", 8));
  EXPECT_EQ(first.kind(), otlp::v1::Span::SPAN_KIND_SERVER);
  EXPECT_EQ(first.start_time_unix_nano(), 1'700'000'000'000'000'000u);
  EXPECT_EQ(first.end_time_unix_nano(), 1'700'000'001'000'000'000u);
  EXPECT_EQ(first.attributes(1).value().int_value(), -3);
  EXPECT_EQ(first.attributes(2).value().double_value(), 0.5);
  EXPECT_TRUE(first.attributes(3).value().bool_value());
  EXPECT_EQ(first.attributes(4).value().array_value().values(1).string_value(), "y");
  EXPECT_FALSE(first.has_status());
  const auto& second = resource.scope_spans(0).spans(1);
  EXPECT_TRUE(second.parent_span_id().empty());
  EXPECT_EQ(second.status().code(), otlp::v1::Status::STATUS_CODE_ERROR);
  EXPECT_EQ(second.status().message(), "why");
}

TEST(Tracer, SendsBatchesAndTheLastOneAtItsEnd) {
  Collector collector(200);
  {
    auto tracer = Tracer::Start({.endpoint = collector.url(), .service = "minke-test", .batch_spans_max = 3});
    ASSERT_TRUE(tracer.ok()) << tracer.status();
    for (int i = 0; i < 7; ++i) (*tracer)->Record(MakeSpan());
  }
  const auto requests = collector.requests();
  ASSERT_EQ(requests.size(), 3u);
  int spans = 0;
  for (const std::string& request : requests) {
    EXPECT_EQ(request.rfind("POST /v1/traces HTTP/1.1\r\n", 0), 0u);
    EXPECT_NE(request.find("application/x-protobuf"), std::string::npos);
    otlp::v1::ExportTraceServiceRequest parsed;
    ASSERT_TRUE(parsed.ParseFromString(request.substr(request.find("\r\n\r\n") + 4)));
    spans += parsed.resource_spans(0).scope_spans(0).spans_size();
  }
  EXPECT_EQ(spans, 7);
}

TEST(Tracer, DropsAndCountsWhatTheCollectorDoesNotTake) {
  for (const int status : {503, 400, 0}) {
    Collector collector(status);
    auto tracer = Tracer::Start(
        {.endpoint = collector.url(), .service = "t", .timeout = std::chrono::milliseconds(200)});
    ASSERT_TRUE(tracer.ok());
    (*tracer)->Record(MakeSpan());
    for (int i = 0; i < 3000 && (*tracer)->counters().dropped == 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_EQ((*tracer)->counters().dropped, 1u) << status;
    EXPECT_EQ((*tracer)->counters().sent, 0u);
    // Another try only where it makes sense.
    EXPECT_EQ(collector.requests().size(), status == 400 ? 1u : 2u);
  }
}

TEST(Tracer, NeverHoldsMoreThanItsQueueNorBlocks) {
  Collector collector(0);  // takes a request and says nothing
  auto tracer = Tracer::Start({.endpoint = collector.url(),
                               .service = "t",
                               .queue_spans_max = 10,
                               .batch_spans_max = 5,
                               .timeout = std::chrono::milliseconds(300)});
  ASSERT_TRUE(tracer.ok());
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) (*tracer)->Record(MakeSpan());
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(250));
  EXPECT_GE((*tracer)->counters().dropped, 980u);
  tracer->reset();  // ends, although nobody answers
}

TEST(Tracer, IsNoneWithoutAnEndpoint) {
  EXPECT_EQ(*Tracer::Start({}), nullptr);
  EXPECT_FALSE(Tracer::Start({.endpoint = "ftp://x"}).ok());
}

}  // namespace
}  // namespace minke::tracing
