// Raw bytes at the gateway's real HTTP server over a loopback connection: heads, bodies, chunks, pipelined
// requests. A part mark cuts the bytes into writes. Whatever comes, the connection ends in time, answers are
// well-formed HTTP with nothing of the request's own in their heads, and bodies handed on keep the limit.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "libs/http/exchange.h"
#include "libs/http/server.h"
#include "libs/tracing/span.h"
#include "tests/fuzz/fuzz.h"

namespace minke {
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

// From another loopback address each time: so many connections to one port leave no free ports behind them.
int Connect(int port) {
  static uint32_t number = 0;
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  FUZZ_ASSERT(fd >= 0);
  sockaddr_in own{};
  own.sin_family = AF_INET;
  own.sin_addr.s_addr = htonl(INADDR_LOOPBACK + ++number % 60000 * 256);
  (void)bind(fd, reinterpret_cast<sockaddr*>(&own),
             sizeof(own));  // where that is not possible, from 127.0.0.1
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  const timeval patience{.tv_sec = 10, .tv_usec = 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  // libFuzzer's timer would interrupt it, and what is interrupted goes on by itself.
  sigset_t timer, before;
  sigemptyset(&timer);
  sigaddset(&timer, SIGALRM);
  pthread_sigmask(SIG_BLOCK, &timer, &before);
  for (int tries = 0; connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0; ++tries) {
    FUZZ_ASSERT(errno == EADDRNOTAVAIL && tries < 1000);  // no port is free yet
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return fd;
}

enum class Taken { kWhole, kCutStream, kCut };

// Takes one answer off the front. A stream may be cut: a client that closes its half of the connection has
// left.
Taken TakeAnswer(std::string_view* text, bool head_only) {
  const size_t end = text->find("\r\n\r\n");
  if (end == std::string_view::npos) return Taken::kCut;
  std::string_view head = text->substr(0, end + 2);
  text->remove_prefix(end + 4);
  FUZZ_ASSERT(head.starts_with("HTTP/1.1 ") && head[9] >= '1' && head[9] <= '5');
  if (head.starts_with("HTTP/1.1 100 ")) {
    FUZZ_ASSERT(head == "HTTP/1.1 100 Continue\r\n");
    return text->empty() ? Taken::kCutStream : TakeAnswer(text, head_only);  // the body never came
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
  if (head_only) return Taken::kWhole;
  if (chunked) {
    for (;;) {
      const size_t line = text->find("\r\n");
      if (line == std::string_view::npos) return Taken::kCutStream;
      const size_t size = std::stoul(std::string(text->substr(0, line)), nullptr, 16);
      if (text->size() < line + 2 + size + 2) return Taken::kCutStream;
      FUZZ_ASSERT(text->substr(line + 2 + size, 2) == "\r\n");
      text->remove_prefix(line + 2 + size + 2);
      if (size == 0) return Taken::kWhole;
    }
  }
  if (!has_length) {  // until the end, to HTTP/1.0
    *text = {};
    return Taken::kWhole;
  }
  if (text->size() < length) return Taken::kCut;
  text->remove_prefix(length);
  return Taken::kWhole;
}

}  // namespace
}  // namespace minke

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace minke;
  static Server& here = *new Server;  // its threads run until the process ends
  if (bytes > 64 << 10) return 0;
  minke::fuzz::Input input(data, bytes);
  const int fd = Connect(here.server->port());
  while (!input.empty()) {
    const std::string_view piece = input.TakeUntil(minke::fuzz::kPart);
    ssize_t sent = 0;
    do {
      sent = send(fd, piece.data(), piece.size(), MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0) break;  // it has closed already
  }
  shutdown(fd, SHUT_WR);
  std::string answer;
  char buffer[4096];
  bool reset = false;
  for (;;) {
    const ssize_t got = recv(fd, buffer, sizeof(buffer), 0);
    if (got == 0) break;
    if (got < 0) {
      if (errno == EINTR) continue;
      FUZZ_ASSERT(errno == ECONNRESET && "it ends in time");
      reset = true;
      break;
    }
    answer.append(buffer, static_cast<size_t>(got));
  }
  close(fd);
  // It lets go of the connection, also of one that it reset; and then no answer of this input's is still to
  // come.
  for (int tries = 0; here.server->connections() > 0; ++tries) {
    FUZZ_ASSERT(tries < 100'000);
    std::this_thread::sleep_for(std::chrono::microseconds(tries < 100 ? 10 : 100));
  }
  std::deque<std::string> methods = here.handler.TakeMethods();
  std::string_view rest = answer;
  while (!rest.empty()) {
    const bool head_only = !methods.empty() && methods.front() == "HEAD";
    if (!methods.empty()) methods.pop_front();
    const Taken taken = TakeAnswer(&rest, head_only);
    FUZZ_ASSERT((taken != Taken::kCut || reset) && "an answer cut off without a reason");
    if (taken != Taken::kWhole) break;
  }
  return 0;
}
