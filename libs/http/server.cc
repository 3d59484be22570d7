#include "libs/http/server.h"

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <condition_variable>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "boost/asio.hpp"
#include "boost/asio/ssl/error.hpp"
#include "boost/beast/core.hpp"
#include "boost/beast/http.hpp"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/http/stream.h"

namespace minke {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
constexpr char kTag[] = "http";

using TcpStream = beast::basic_stream<tcp, asio::io_context::executor_type>;

// One I/O thread. Connections share it, so that a late wake-up never meets a destroyed executor.
struct IoThread {
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> guard = asio::make_work_guard(context);
  std::thread thread;
};

std::string PercentDecoded(std::string_view text) {
  const auto hex = [](char c) {
    return std::isdigit(static_cast<unsigned char>(c)) ? c - '0' : (c | 0x20) - 'a' + 10;
  };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && std::isxdigit(static_cast<unsigned char>(text[i + 1])) &&
        std::isxdigit(static_cast<unsigned char>(text[i + 2]))) {
      out.push_back(static_cast<char>(hex(text[i + 1]) << 4 | hex(text[i + 2])));
      i += 2;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

// A client's own id is taken if it can stand in a header and a log line as it is.
std::string RequestId(std::string_view theirs) {
  const auto sane = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.' || c == ':';
  };
  if (!theirs.empty() && theirs.size() <= 128 && std::all_of(theirs.begin(), theirs.end(), sane))
    return std::string(theirs);
  thread_local std::mt19937_64 random = [] {
    std::random_device device;
    return std::mt19937_64(static_cast<uint64_t>(device()) << 32 | device());
  }();
  return absl::StrFormat("%016x%016x", random(), random());
}

// Whether the bytes are at fault, and not the connection: an answer makes sense then.
bool IsMalformed(const error_code& error) {
  return error.category() == make_error_code(http::error::bad_method).category() &&
         error != http::error::end_of_stream && error != http::error::partial_message;
}

std::string_view View(boost::core::string_view text) { return {text.data(), text.size()}; }

template <class Body>
HttpRequest MakeRequest(const http::request<Body>& message) {
  HttpRequest request;
  request.method = std::string(View(message.method_string()));
  std::string_view target = View(message.target());
  if (target.starts_with("http://")) {  // absolute form, as proxies send it
    const size_t slash = target.find('/', 7);
    target = slash == std::string_view::npos ? "/" : target.substr(slash);
  }
  request.path = PercentDecoded(target.substr(0, target.find('?')));
  request.authorization = std::string(View(message[http::field::authorization]));
  request.if_none_match = std::string(View(message[http::field::if_none_match]));
  request.request_id = RequestId(View(message["x-request-id"]));
  request.traceparent = std::string(View(message["traceparent"]));
  return request;
}

}  // namespace

// ---- state shared by all connections
// -----------------------------------------------------------------------

class HttpServer::Impl : public std::enable_shared_from_this<HttpServer::Impl> {
 public:
  Impl(HttpServerOptions options, HttpHandler* handler)
      : options_(std::move(options)), handler_(*handler), workers_(options_.worker_threads) {}

  absl::Status Listen();
  void Run();
  void Shutdown(std::chrono::milliseconds grace);
  int port() const { return port_; }
  int connections() const { return connections_.load(); }
  int64_t failed_handshakes() const { return failed_handshakes_.load(); }

 private:
  class Connection;
  friend class Connection;

  asio::awaitable<void> Accept();
  void Admit(TcpStream::socket_type socket, std::shared_ptr<IoThread> io);
  void ForEachConnection(void (Connection::*what)());

  const HttpServerOptions options_;
  HttpHandler& handler_;
  asio::thread_pool workers_;
  std::vector<std::shared_ptr<IoThread>> io_threads_;
  std::unique_ptr<tcp::acceptor> acceptor_;  // used by I/O thread 0 once running
  int port_ = 0;
  std::atomic<int> connections_{0};
  std::atomic<int64_t> failed_handshakes_{0};
  std::atomic<int64_t> body_bytes_{0};  // held by requests being read
  std::atomic<bool> stopping_{false};
  std::atomic<bool> shut_down_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<Connection*> open_;  // guarded by mutex_; entries remove themselves before they die
};

// ---- one connection
// ----------------------------------------------------------------------------------------

class HttpServer::Impl::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<Impl> server, std::shared_ptr<IoThread> io, TcpStream::socket_type socket)
      : server_(std::move(server)),
        io_(std::move(io)),
        stream_(TcpStream(std::move(socket))),
        wake_timer_(io_->context) {}

  asio::awaitable<void> Run();

  // Both from any thread.
  void CloseIfIdle() {
    asio::post(io_->context, [self = shared_from_this()] {
      if (self->idle_) self->Close();
    });
  }
  void Abort() {
    asio::post(io_->context, [self = shared_from_this()] {
      self->left_ = true;
      self->Close();
      self->wake_timer_.cancel();
    });
  }

 private:
  // How one request ended.
  enum class Next { kKeep, kClose, kDrain };

  asio::awaitable<bool> Handshake();
  asio::awaitable<void> ExplainTls();
  asio::awaitable<void> FinishSending();
  asio::awaitable<Next> ServeOne();
  asio::awaitable<error_code> ReadBody(http::request_parser<http::string_body>& parser);
  asio::awaitable<std::unique_ptr<Exchange>> HandleBody(HttpRequest request);
  asio::awaitable<bool> Answer(Exchange& exchange, const HttpRequest& request, bool keep_alive);
  asio::awaitable<bool> Write(const std::string& head, const std::string& body);
  asio::awaitable<void> Drain();
  asio::awaitable<void> WatchForClientLeaving(std::shared_ptr<bool> active);
  asio::awaitable<void> EndWatch();
  std::string FormatHead(const HttpHead& head, const HttpRequest& request, bool keep_alive,
                         size_t body_bytes) const;
  std::function<void()> Waker();
  void Close() {
    error_code ignored;
    wire().socket().close(ignored);
  }
  const HttpServerOptions& options() const { return server_->options_; }
  TcpStream& wire() { return stream_.tcp(); }

  const std::shared_ptr<Impl> server_;  // shared with all connections
  const std::shared_ptr<IoThread> io_;
  HttpStream<TcpStream> stream_;
  beast::flat_buffer buffer_;
  asio::steady_timer wake_timer_;
  int version_ = 11;
  bool idle_ = true;
  bool left_ = false;      // the client is gone, or the server gives up on it
  bool watched_ = false;   // WatchForClientLeaving is under way, and with TLS reads into buffer_
  bool finished_ = false;  // FinishSending was called
};

asio::awaitable<void> HttpServer::Impl::Connection::Run() {
  if (options().identity != nullptr) {
    const bool secure = co_await Handshake();
    if (!secure) {
      Close();
      co_return;
    }
  }
  for (;;) {
    if (buffer_.size() == 0) {
      idle_ = true;
      if (server_->stopping_) break;
      wire().expires_after(options().idle_timeout);
      auto [error, bytes] = co_await stream_.async_read_some(buffer_.prepare(16 << 10), kToken);
      if (error) break;
      buffer_.commit(bytes);
    }
    idle_ = false;
    const Next next = co_await ServeOne();
    if (next == Next::kDrain) co_await Drain();
    if (next != Next::kKeep || server_->stopping_ || left_) break;
  }
  co_await FinishSending();
  Close();
}

asio::awaitable<bool> HttpServer::Impl::Connection::Handshake() {
  // The certificates of this moment; the connection keeps them.
  auto& tls = stream_.Encrypt(options().identity->current()->http_server.get());
  wire().expires_after(options().handshake_timeout);
  auto [error] = co_await tls.async_handshake(asio::ssl::stream_base::server, kToken);
  if (!error) co_return true;
  server_->failed_handshakes_.fetch_add(1);
  log::Debug(kTag, StrCat("TLS handshake failed: ", error.message()));
  if (error.category() == asio::error::get_ssl_category() &&
      ERR_GET_REASON(static_cast<unsigned long>(error.value())) == SSL_R_HTTP_REQUEST) {
    co_await ExplainTls();
  }
  co_return false;
}

// To a client that began in plaintext.
asio::awaitable<void> HttpServer::Impl::Connection::ExplainTls() {
  const std::string answer =
      "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
      R"({"error":{"message":"expected https, found http","type":"invalid_request_error","param":null,"code":null}})";
  wire().expires_after(options().write_timeout);
  auto [error, bytes] = co_await asio::async_write(wire(), asio::buffer(answer), kToken);
  finished_ = true;  // there is no TLS to take leave of
  if (!error) co_await Drain();
}

// So that the client can tell the end from a connection that broke.
asio::awaitable<void> HttpServer::Impl::Connection::FinishSending() {
  if (!std::exchange(finished_, true) && stream_.encrypted() && wire().socket().is_open()) {
    wire().expires_after(options().farewell_timeout);
    [[maybe_unused]] auto [error] = co_await stream_.tls().async_shutdown(kToken);
  }
  error_code ignored;
  wire().socket().shutdown(tcp::socket::shutdown_send, ignored);
}

asio::awaitable<HttpServer::Impl::Connection::Next> HttpServer::Impl::Connection::ServeOne() {
  http::request_parser<http::string_body> parser;
  parser.header_limit(options().header_bytes_max);
  parser.body_limit(static_cast<uint64_t>(options().body_bytes_max));
  wire().expires_after(options().header_timeout);
  auto [error, bytes] = co_await http::async_read_header(stream_, buffer_, parser, kToken);
  if (error == http::error::end_of_stream || error == http::error::partial_message || left_)
    co_return Next::kClose;
  if (error && !IsMalformed(error)) co_return Next::kClose;  // timeout, reset

  HttpRequest request = MakeRequest(parser.get());
  version_ = parser.get().version() == 10 ? 10 : 11;
  bool too_large = error == http::error::body_limit;
  std::unique_ptr<Exchange> exchange;
  if (error && !too_large) {
    const bool long_head = error == http::error::header_limit || error == http::error::buffer_overflow;
    exchange =
        server_->handler_.Refuse(long_head ? 431 : 400, StrCat("not an HTTP request: ", error.message()));
    co_await Answer(*exchange, request, /*keep_alive=*/false);
    co_return Next::kDrain;
  }
  bool keep_alive = parser.get().keep_alive() && !server_->stopping_;
  exchange = server_->handler_.HandleHead(request);
  if (exchange == nullptr && !too_large) {
    if (beast::iequals(parser.get()[http::field::expect], "100-continue")) {
      // Named, and no `&&` around co_await: GCC 12 mishandles temporaries of some such expressions.
      const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n", nothing;
      const bool written = co_await Write(go_on, nothing);
      if (!written) co_return Next::kClose;
    }
    const error_code body_error = co_await ReadBody(parser);
    too_large = body_error == http::error::body_limit;
    if (body_error == http::error::buffer_overflow) {
      exchange = server_->handler_.Refuse(503, "too many large requests at once; try again later");
    } else if (body_error && !too_large) {
      if (!IsMalformed(body_error)) co_return Next::kClose;
      exchange = server_->handler_.Refuse(400, StrCat("the body cannot be read: ", body_error.message()));
    } else if (!too_large) {
      request.body = std::move(parser.get().body());
    }
  }
  if (too_large && exchange == nullptr) exchange = server_->handler_.BodyTooLarge(options().body_bytes_max);
  const bool unread = exchange != nullptr && !parser.is_done();
  const auto watching =
      std::make_shared<bool>(exchange == nullptr);  // an answer that is there needs no watch
  if (exchange == nullptr) {
    HttpRequest head{.method = request.method, .path = request.path, .request_id = request.request_id};
    exchange = co_await HandleBody(std::move(request));
    request = std::move(head);
    if (exchange == nullptr) co_return Next::kClose;
  }
  keep_alive = keep_alive && !unread;
  if (*watching) {
    watched_ = true;
    asio::co_spawn(
        io_->context, [self = shared_from_this(), watching] { return self->WatchForClientLeaving(watching); },
        asio::detached);
  }
  const bool answered = co_await Answer(*exchange, request, keep_alive);
  exchange.reset();
  *watching = false;
  co_await EndWatch();
  if (!answered) co_return Next::kClose;
  co_return unread ? Next::kDrain : keep_alive ? Next::kKeep : Next::kClose;
}

asio::awaitable<error_code> HttpServer::Impl::Connection::ReadBody(
    http::request_parser<http::string_body>& parser) {
  wire().expires_after(options().body_timeout);
  int64_t counted = 0;
  error_code result;
  while (!parser.is_done() && !result) {
    auto [error, bytes] = co_await http::async_read_some(stream_, buffer_, parser, kToken);
    result = error;
    const auto held = static_cast<int64_t>(parser.get().body().capacity());
    if (server_->body_bytes_.fetch_add(held - counted) + held - counted > options().body_bytes_total_max) {
      result = make_error_code(http::error::buffer_overflow);
    }
    counted = held;
  }
  server_->body_bytes_.fetch_sub(counted);
  co_return result;
}

asio::awaitable<std::unique_ptr<Exchange>> HttpServer::Impl::Connection::HandleBody(HttpRequest request) {
  const auto handle = [this](HttpRequest&& taken) -> std::unique_ptr<Exchange> {
    const std::string id = taken.request_id;
    try {
      return server_->handler_.Handle(std::move(taken), Waker());
    } catch (const std::exception& exception) {  // bad_alloc and its like: this request's loss only
      log::Error(kTag, StrCat("request_id=", id, " failed: ", exception.what()));
      return server_->handler_.Refuse(500, "internal error");
    }
  };
  if (static_cast<int64_t>(request.body.size()) <= options().inline_body_bytes)
    co_return handle(std::move(request));
  auto on_worker = [&handle, &request]() -> asio::awaitable<std::unique_ptr<Exchange>> {
    co_return handle(std::move(request));
  };
  std::unique_ptr<Exchange> exchange =
      co_await asio::co_spawn(server_->workers_, on_worker, asio::use_awaitable);
  co_return exchange;
}

asio::awaitable<bool> HttpServer::Impl::Connection::Answer(Exchange& exchange, const HttpRequest& request,
                                                           bool keep_alive) {
  const bool head_only = request.method == "HEAD";
  bool streaming = false;
  for (;;) {
    Exchange::Output out;
    exchange.Poll(&out);
    if (!out.head && out.body.empty() && !out.done) {
      if (left_) co_return false;
      wake_timer_.expires_at(exchange.deadline());
      co_await wake_timer_.async_wait(kToken);
      continue;
    }
    if (left_) co_return false;
    std::string head;
    if (out.head) {
      streaming = out.head->stream;
      server_->handler_.OnAnswer(request, out.head->status);
      head = FormatHead(*out.head, request, keep_alive, out.body.size());
    }
    const bool chunked = streaming && version_ == 11;
    if (chunked && !out.body.empty()) {
      out.body.insert(0, absl::StrFormat("%x\r\n", out.body.size()));
      out.body += "\r\n";
    }
    if (chunked && out.done) out.body += "0\r\n\r\n";
    if (head_only || (out.head && (out.head->status == 204 || out.head->status == 304))) out.body.clear();
    if (!head.empty() || !out.body.empty()) {
      const bool written = co_await Write(head, out.body);
      if (!written) co_return false;
    }
    if (out.done) co_return !(streaming && version_ == 10);  // without chunks the end is the connection's
  }
}

std::string HttpServer::Impl::Connection::FormatHead(const HttpHead& head, const HttpRequest& request,
                                                     bool keep_alive, size_t body_bytes) const {
  const bool until_close = head.stream && version_ == 10;
  std::string text = StrCat("HTTP/1.1 ", head.status, " ",
                            View(http::obsolete_reason(static_cast<http::status>(head.status))),
                            "\r\nserver: minke\r\nx-request-id: ", request.request_id, "\r\n");
  const bool no_body = head.status == 204 || head.status == 304;
  if (!no_body) StrAppend(&text, "content-type: ", head.content_type, "\r\n");
  if (head.stream) {
    StrAppend(&text, "cache-control: no-cache\r\nx-accel-buffering: no\r\n");
    if (!until_close) StrAppend(&text, "transfer-encoding: chunked\r\n");
  } else if (!no_body) {
    StrAppend(&text, "content-length: ", body_bytes, "\r\n");
  }
  if (head.retry_after_s > 0) StrAppend(&text, "retry-after: ", head.retry_after_s, "\r\n");
  if (!head.allow.empty()) StrAppend(&text, "allow: ", head.allow, "\r\n");
  for (const auto& [name, value] : head.fields) StrAppend(&text, name, ": ", value, "\r\n");
  if (head.status == 401) StrAppend(&text, "www-authenticate: Bearer\r\n");
  StrAppend(&text, "connection: ", keep_alive && !until_close ? "keep-alive" : "close", "\r\n\r\n");
  return text;
}

asio::awaitable<bool> HttpServer::Impl::Connection::Write(const std::string& head, const std::string& body) {
  if (stream_.encrypted() && !head.empty() && !body.empty()) {  // one record instead of two
    const std::string both = head + body, nothing;
    const bool written = co_await Write(both, nothing);
    co_return written;
  }
  const std::array<asio::const_buffer, 2> buffers = {asio::buffer(head), asio::buffer(body)};
  beast::buffers_suffix<std::array<asio::const_buffer, 2>> rest(buffers);
  while (beast::buffer_bytes(rest) > 0) {
    wire().expires_after(options().write_timeout);  // anew for every bit of progress
    auto [error, bytes] = co_await stream_.async_write_some(rest, kToken);
    if (error) co_return false;
    rest.consume(bytes);
  }
  co_return true;
}

asio::awaitable<void> HttpServer::Impl::Connection::Drain() {
  co_await FinishSending();
  std::vector<char> scratch(64 << 10);
  wire().expires_after(options().drain_timeout);
  for (int64_t drained = 0; drained < options().drain_bytes_max && !left_;) {
    auto [error, bytes] =
        co_await wire().async_read_some(asio::buffer(scratch), kToken);  // unread, encrypted or not
    if (error) break;
    drained += static_cast<int64_t>(bytes);
  }
}

asio::awaitable<void> HttpServer::Impl::Connection::WatchForClientLeaving(std::shared_ptr<bool> active) {
  error_code error;
  if (stream_.encrypted() && *active) {
    // A client's leaving is a record like its next request: only reading tells them apart.
    wire().expires_never();
    auto [read_error, bytes] = co_await stream_.async_read_some(buffer_.prepare(16 << 10), kToken);
    if (!read_error) buffer_.commit(bytes);
    error = read_error;
  } else if (*active) {
    auto [wait_error] = co_await wire().socket().async_wait(tcp::socket::wait_read, kToken);
    error = wait_error;
  }
  watched_ = false;
  if (!*active) {
    wake_timer_.cancel();  // EndWatch
    co_return;
  }
  if (!error && stream_.encrypted()) co_return;  // the next request
  if (!error) {
    char byte;
    const ssize_t got = recv(wire().socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    // The next request is already there, or the rest of a body that is not wanted: leaving shows when writing
    // fails.
    if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) co_return;
  }
  left_ = true;
  wake_timer_.cancel();
}

asio::awaitable<void> HttpServer::Impl::Connection::EndWatch() {
  error_code ignored;
  wire().socket().cancel(ignored);           // nothing else is under way on this socket
  while (watched_ && stream_.encrypted()) {  // it has our buffer
    wake_timer_.expires_at(Clock::time_point::max());
    co_await wake_timer_.async_wait(kToken);
  }
}

std::function<void()> HttpServer::Impl::Connection::Waker() {
  return [weak = weak_from_this()] {  // the pool may call after the connection is gone
    if (auto self = weak.lock()) {
      auto& context = self->io_->context;
      asio::post(context, [self = std::move(self)] { self->wake_timer_.cancel(); });
    }
  };
}

// ---- listening and stopping
// --------------------------------------------------------------------------------

absl::Status HttpServer::Impl::Listen() {
  for (int i = 0; i < options_.io_threads; ++i) io_threads_.push_back(std::make_shared<IoThread>());
  const std::string& listen = options_.listen;
  const size_t colon = listen.rfind(':');
  absl::Status malformed =
      absl::InvalidArgumentError(StrCat("listen address: expected HOST:PORT, found \"", listen, "\""));
  if (colon == std::string::npos) return malformed;
  std::string host = listen.substr(0, colon);
  const std::string port = listen.substr(colon + 1);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  if (port.empty() || port.size() > 5 || port.find_first_not_of("0123456789") != std::string::npos ||
      std::stoi(port) > 65535) {
    return malformed;
  }
  asio::io_context& context = io_threads_[0]->context;
  error_code error;
  tcp::endpoint endpoint(asio::ip::make_address(host, error), static_cast<uint16_t>(std::stoi(port)));
  if (error) {
    const auto resolved = tcp::resolver(context).resolve(host, port, tcp::resolver::passive, error);
    if (error || resolved.empty())
      return absl::InvalidArgumentError(StrCat("listen address ", listen, ": ", error.message()));
    endpoint = *resolved.begin();
  }
  acceptor_ = std::make_unique<tcp::acceptor>(context);
  acceptor_->open(endpoint.protocol(), error);
  if (!error) acceptor_->set_option(asio::socket_base::reuse_address(true), error);
  if (!error) acceptor_->bind(endpoint, error);
  if (!error) acceptor_->listen(4096, error);
  if (error) return absl::FailedPreconditionError(StrCat("cannot listen on ", listen, ": ", error.message()));
  port_ = acceptor_->local_endpoint().port();
  return absl::OkStatus();
}

void HttpServer::Impl::Run() {
  asio::co_spawn(io_threads_[0]->context, Accept(), asio::detached);
  for (const auto& io : io_threads_) {
    io->thread = std::thread([context = &io->context] { context->run(); });
  }
}

asio::awaitable<void> HttpServer::Impl::Accept() {
  const auto self = shared_from_this();
  for (size_t next = 0;; ++next) {
    const std::shared_ptr<IoThread> io = io_threads_[next % io_threads_.size()];
    auto [error, socket] = co_await acceptor_->async_accept(io->context, kToken);
    if (stopping_) co_return;
    if (!error) {
      Admit(std::move(socket), io);
      continue;
    }
    // Out of descriptors or memory: what is open goes on, new clients wait in the backlog.
    log::Warning(kTag, StrCat("accept: ", error.message()));
    asio::steady_timer pause(co_await asio::this_coro::executor, std::chrono::milliseconds(50));
    co_await pause.async_wait(kToken);
  }
}

void HttpServer::Impl::Admit(TcpStream::socket_type socket, std::shared_ptr<IoThread> io) {
  error_code ignored;
  if (connections_.fetch_add(1) >= options_.connections_max) {
    constexpr std::string_view kFull =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: "
        "close\r\n\r\n"
        R"({"error":{"message":"too many connections","type":"service_unavailable_error","param":null,"code":"overloaded"}})";
    if (options_.identity == nullptr)
      send(socket.native_handle(), kFull.data(), kFull.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    connections_.fetch_sub(1);
    return;
  }
  socket.set_option(tcp::no_delay(true), ignored);
  asio::io_context& context = io->context;
  const auto connection = std::make_shared<Connection>(shared_from_this(), std::move(io), std::move(socket));
  {
    const std::lock_guard lock(mutex_);
    open_.insert(connection.get());
  }
  asio::co_spawn(
      context, [connection] { return connection->Run(); },
      [connection, this](const std::exception_ptr& exception) {
        if (exception) log::Error(kTag, "a connection ended with an exception");
        connections_.fetch_sub(1);
        const std::lock_guard lock(mutex_);
        open_.erase(connection.get());
        changed_.notify_all();
      });
}

void HttpServer::Impl::ForEachConnection(void (Connection::*what)()) {
  const std::lock_guard lock(mutex_);
  for (Connection* connection : open_) (connection->*what)();
}

void HttpServer::Impl::Shutdown(std::chrono::milliseconds grace) {
  if (shut_down_.exchange(true)) return;
  const auto deadline = Clock::now() + grace;
  stopping_ = true;
  asio::post(io_threads_[0]->context, [self = shared_from_this()] {
    error_code ignored;
    self->acceptor_->close(ignored);
  });
  ForEachConnection(&Connection::CloseIfIdle);
  {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [this] { return open_.empty(); });
  }
  ForEachConnection(&Connection::Abort);
  for (const auto& io : io_threads_) io->guard.reset();
  for (const auto& io : io_threads_) io->thread.join();
  workers_.join();
}

HttpServer::HttpServer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() { Shutdown(std::chrono::milliseconds(0)); }
int HttpServer::port() const { return impl_->port(); }
int HttpServer::connections() const { return impl_->connections(); }
int64_t HttpServer::failed_handshakes() const { return impl_->failed_handshakes(); }
void HttpServer::Shutdown(std::chrono::milliseconds grace) { impl_->Shutdown(grace); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(HttpServerOptions options,
                                                              HttpHandler* handler) {
  if (options.io_threads < 1 || options.worker_threads < 1) {
    return absl::InvalidArgumentError(StrCat("expected at least one I/O and one worker thread, found ",
                                             options.io_threads, " and ", options.worker_threads));
  }
  const auto impl = std::make_shared<Impl>(std::move(options), handler);
  MK_RETURN_IF_ERROR(impl->Listen());
  impl->Run();
  return std::unique_ptr<HttpServer>(new HttpServer(impl));
}

}  // namespace minke
