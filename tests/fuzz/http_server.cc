// Raw bytes at the gateway's real HTTP server over a loopback connection: heads, bodies, chunks, pipelined
// requests. A part mark cuts the bytes into writes. Whatever comes, the connection ends in time, answers are
// well-formed HTTP with nothing of the request's own in their heads, and bodies handed on keep the limit.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "libs/tracing/span.h"
#include "services/gateway/http/exchange.h"
#include "services/gateway/http/server.h"
#include "tests/fuzz/fuzz.h"

namespace minke::gateway {
namespace {

constexpr int64_t kBodyMax = 4096;

// An answer that is there, whole or as a stream of two pieces.
class Answer final : public Exchange {
 public:
  Answer(int status, std::string body, bool stream)
      : status_(status), body_(std::move(body)), stream_(stream) {}
  void Poll(Output* out) override {
    if (!begun_) out->head = HttpHead{.status = status_, .stream = stream_};
    out->body = body_;
    out->done = begun_ || !stream_;
    begun_ = true;
  }
  std::chrono::steady_clock::time_point deadline() const override {
    return std::chrono::steady_clock::time_point::max();
  }

 private:
  const int status_;
  const std::string body_;
  const bool stream_;
  bool begun_ = false;
};

class Handler final : public HttpHandler {
 public:
  std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) override {
    Check(head);
    if (head.method == "POST") return nullptr;
    return std::make_unique<Answer>(head.method == "GET" || head.method == "HEAD" ? 200 : 405, "{}", false);
  }
  std::unique_ptr<Exchange> Handle(HttpRequest request, std::function<void()>) override {
    Check(request);
    FUZZ_ASSERT(static_cast<int64_t>(request.body.size()) <= kBodyMax);
    return std::make_unique<Answer>(200, request.body, request.path == "/stream");
  }
  std::unique_ptr<Exchange> BodyTooLarge(int64_t body_bytes_max) override {
    FUZZ_ASSERT(body_bytes_max == kBodyMax);
    return std::make_unique<Answer>(413, "{}", false);
  }
  std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) override {
    FUZZ_ASSERT(status >= 400 && !reason.empty());
    return std::make_unique<Answer>(status, "{}", false);
  }
  void OnAnswer(const HttpRequest& request, int) override {
    const std::lock_guard lock(mutex_);
    methods_.push_back(request.method);
  }
  std::deque<std::string> TakeMethods() {
    const std::lock_guard lock(mutex_);
    return std::exchange(methods_, {});
  }

 private:
  static void Check(const HttpRequest& request) {
    FUZZ_ASSERT(!request.request_id.empty() && request.request_id.size() <= 128);
    for (const char c : request.request_id) FUZZ_ASSERT(c > ' ' && c < 0x7f && c != '"' && c != '\\');
    for (const std::string* field :
         {&request.method, &request.authorization, &request.if_none_match, &request.traceparent})
      FUZZ_ASSERT(field->find_first_of(std::string_view("\r\n\0", 3)) == std::string::npos);
    if (const auto trace = tracing::ParseTraceparent(request.traceparent)) {
      const auto again = tracing::ParseTraceparent(tracing::FormatTraceparent(*trace));
      FUZZ_ASSERT(again && again->trace == trace->trace && again->span == trace->span);
    }
  }

  std::mutex mutex_;
  std::deque<std::string> methods_;  // of requests answered, in order
};

struct Server {
  Handler handler;
  std::unique_ptr<HttpServer> server;
  Server() {
    HttpServerOptions options;
    options.listen = "127.0.0.1:0";
    options.io_threads = options.worker_threads = 1;
    options.inline_body_bytes = 256;
    options.body_bytes_max = kBodyMax;
    options.header_bytes_max = 2048;
    auto started = HttpServer::Start(options, &handler);
    FUZZ_ASSERT(started.ok());
    server = *std::move(started);
  }
};

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  FUZZ_ASSERT(fd >= 0);
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  const timeval patience{.tv_sec = 10, .tv_usec = 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  FUZZ_ASSERT(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  return fd;
}

// Takes one answer off the front. False: what is there is cut off.
bool TakeAnswer(std::string_view* text, bool head_only) {
  const size_t end = text->find("\r\n\r\n");
  if (end == std::string_view::npos) return false;
  std::string_view head = text->substr(0, end + 2);
  text->remove_prefix(end + 4);
  FUZZ_ASSERT(head.starts_with("HTTP/1.1 ") && head[9] >= '1' && head[9] <= '5');
  if (head.starts_with("HTTP/1.1 100 ")) {
    FUZZ_ASSERT(head == "HTTP/1.1 100 Continue\r\n");
    return TakeAnswer(text, head_only);
  }
  size_t length = 0;
  bool chunked = false, has_length = false;
  for (head.remove_prefix(head.find("\r\n") + 2); !head.empty();) {
    const std::string_view line = head.substr(0, head.find("\r\n"));
    head.remove_prefix(line.size() + 2);
    const std::string_view name = line.substr(0, line.find(':'));
    bool known = false;
    for (const char* ours : {"server", "x-request-id", "content-type", "cache-control", "x-accel-buffering",
                             "transfer-encoding", "content-length", "connection", "retry-after", "allow"})
      known = known || name == ours;
    FUZZ_ASSERT(known && "only fields of the server's own");
    if (name == "transfer-encoding") chunked = true;
    if (name == "content-length")
      has_length = true, length = std::stoul(std::string(line.substr(name.size() + 2)));
  }
  FUZZ_ASSERT(!(chunked && has_length));
  if (head_only) return true;
  if (chunked) {
    for (;;) {
      const size_t line = text->find("\r\n");
      if (line == std::string_view::npos) return false;
      const size_t size = std::stoul(std::string(text->substr(0, line)), nullptr, 16);
      if (text->size() < line + 2 + size + 2) return false;
      FUZZ_ASSERT(text->substr(line + 2 + size, 2) == "\r\n");
      text->remove_prefix(line + 2 + size + 2);
      if (size == 0) return true;
    }
  }
  if (!has_length) {  // until the end, to HTTP/1.0
    *text = {};
    return true;
  }
  if (text->size() < length) return false;
  text->remove_prefix(length);
  return true;
}

}  // namespace
}  // namespace minke::gateway

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace minke::gateway;
  static Server& here = *new Server;  // its threads run until the process ends
  if (bytes > 64 << 10) return 0;
  minke::fuzz::Input input(data, bytes);
  const int fd = Connect(here.server->port());
  while (!input.empty()) {
    const std::string_view piece = input.TakeUntil(minke::fuzz::kPart);
    if (send(fd, piece.data(), piece.size(), MSG_NOSIGNAL) < 0) break;  // it has closed already
  }
  shutdown(fd, SHUT_WR);
  std::string answer;
  char buffer[4096];
  bool reset = false;
  for (;;) {
    const ssize_t got = recv(fd, buffer, sizeof(buffer), 0);
    if (got == 0) break;
    if (got < 0) {
      FUZZ_ASSERT(errno == ECONNRESET && "it ends in time");
      reset = true;
      break;
    }
    answer.append(buffer, static_cast<size_t>(got));
  }
  close(fd);
  std::deque<std::string> methods = here.handler.TakeMethods();
  std::string_view rest = answer;
  while (!rest.empty()) {
    const bool head_only = !methods.empty() && methods.front() == "HEAD";
    if (!methods.empty()) methods.pop_front();
    if (!TakeAnswer(&rest, head_only)) {
      FUZZ_ASSERT((reset || !rest.empty()) && "an answer cut off without a reason");
      break;
    }
  }
  return 0;
}
