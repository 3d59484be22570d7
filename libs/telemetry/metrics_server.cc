#include "libs/telemetry/metrics_server.h"

#include <utility>

#include "libs/base/strings.h"
#include "libs/http/server.h"

namespace minke::telemetry {
namespace {

constexpr int kConnectionsMax = 64;  // a few scrapers, each with one; the rest is nobody we know
constexpr int64_t kBodyBytesMax = 4 << 10;
constexpr std::chrono::seconds kTimeout{10};

// An answer that is there as a whole.
class Answer final : public Exchange {
 public:
  Answer(HttpHead head, std::string body) : head_(std::move(head)), body_(std::move(body)) {}
  void Poll(Output* out) override { *out = {std::move(head_), std::move(body_), /*done=*/true}; }
  std::chrono::steady_clock::time_point deadline() const override {
    return std::chrono::steady_clock::time_point::max();
  }

 private:
  HttpHead head_;
  std::string body_;
};

std::unique_ptr<Exchange> Say(int status, const std::string& text) {
  return std::make_unique<Answer>(HttpHead{.status = status, .content_type = "text/plain; charset=utf-8"},
                                  text + "\n");
}

// Thread-safe, as the collector is.
class Handler final : public HttpHandler {
 public:
  explicit Handler(Collector collector) : collector_(std::move(collector)) {}

  std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) override {
    if (head.path != "/metrics") return Say(404, "expected /metrics");
    if (head.method != "GET" && head.method != "HEAD") {
      return std::make_unique<Answer>(
          HttpHead{.status = 405, .content_type = "text/plain; charset=utf-8", .allow = "GET, HEAD"},
          "expected GET\n");
    }
    Page page;
    collector_(page);
    return std::make_unique<Answer>(HttpHead{.content_type = kTextContentType}, RenderText(page));
  }
  std::unique_ptr<Exchange> Handle(HttpRequest, std::function<void()>) override {
    return Say(500, "internal error");  // not reached: every head decides its answer
  }
  std::unique_ptr<Exchange> BodyTooLarge(int64_t) override { return Say(413, "expected no body"); }
  std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) override {
    return Say(status, reason);
  }
  void OnAnswer(const HttpRequest&, int) override {}

 private:
  const Collector collector_;
};

}  // namespace

struct MetricsServer::Impl {
  explicit Impl(Collector collector) : handler(std::move(collector)) {}
  Handler handler;
  std::unique_ptr<HttpServer> server;  // ends before the handler
};

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl, const std::string& host) : impl_(std::move(impl)) {
  address_ = StrCat(host, ":", port());
}
MetricsServer::~MetricsServer() = default;

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& listen,
                                                                    Collector collector,
                                                                    std::shared_ptr<tls::Identity> identity) {
  auto impl = std::make_unique<Impl>(std::move(collector));
  auto server = HttpServer::Start({.listen = listen,
                                   .io_threads = 1,
                                   .worker_threads = 1,
                                   .body_bytes_max = kBodyBytesMax,
                                   .connections_max = kConnectionsMax,
                                   .identity = std::move(identity),
                                   .header_timeout = kTimeout,
                                   .body_timeout = kTimeout,
                                   .write_timeout = kTimeout,
                                   .drain_timeout = kTimeout,
                                   .drain_bytes_max = kBodyBytesMax},
                                  &impl->handler);
  if (!server.ok()) {
    return absl::UnavailableError(
        StrCat("metrics: cannot listen on ", listen,
               ": expected a free port on an address of this host: ", server.status().message()));
  }
  impl->server = *std::move(server);
  return std::unique_ptr<MetricsServer>(
      new MetricsServer(std::move(impl), listen.substr(0, listen.rfind(':'))));
}

int MetricsServer::port() const { return impl_->server->port(); }

}  // namespace minke::telemetry
