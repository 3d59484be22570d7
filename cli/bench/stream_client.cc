#include "cli/bench/stream_client.h"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <set>
#include <vector>

#include "libs/base/status.h"
#include "libs/http/stream.h"

namespace minke::cli::bench {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;
// Not the executor that can be any: one virtual call less for each operation.
using Socket = tcp::socket::rebind_executor<asio::io_context::executor_type>::other;

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);

// A token's event has some 300 bytes; a thousand idle streams hold 8 MB of these.
constexpr size_t kReadBytes = 8 << 10;
constexpr uint32_t kHeadBytesMax = 64 << 10;

// One connection, lent to one exchange at a time. The deadline's handler may run after the exchange: it
// shares ownership.
struct Connection : std::enable_shared_from_this<Connection> {
  explicit Connection(asio::io_context& context) : stream(Socket(context)), timer(context) {}

  // From now on whatever is under way on the socket ends at `deadline`.
  void Arm(Clock::time_point deadline) {
    timer.expires_at(deadline);
    timer.async_wait([self = shared_from_this()](error_code error) {
      // Queued, but the connection went on to its next exchange before this ran: the deadline is another one.
      if (error || self->timer.expiry() > Clock::now()) return;
      self->timed_out = true;
      self->Close();
    });
  }
  void Close() {
    error_code ignored;
    stream.tcp().close(ignored);
  }
  // Nothing to read, not even the end: the server still listens.
  bool Usable() {
    char byte;
    const ssize_t got = recv(stream.tcp().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
  }

  HttpStream<Socket> stream;
  asio::steady_timer timer;
  beast::flat_buffer buffer;
  bool timed_out = false;
  bool cancelled = false;
};

std::string OneLine(std::string text) {
  for (char& c : text) {
    if (c == '\r' || c == '\n') c = ' ';
  }
  return text;
}

}  // namespace

class StreamClient::Impl {
 public:
  Impl(asio::io_context& context, const Endpoint& server, const std::string& api_key)
      : context_(context),
        server_(server),
        fixed_head_(StrCat(" HTTP/1.1\r\nhost: ", server.url.HostPort(),
                           "\r\nuser-agent: minke-bench\r\naccept: text/event-stream, application/json\r\n",
                           api_key.empty() ? "" : StrCat("authorization: Bearer ", api_key, "\r\n"))) {}

  absl::Status Resolve();
  asio::awaitable<Exchange> Send(const std::string& path, const std::string& json, Clock::time_point deadline,
                                 BodyFunction on_body);
  void CancelAll() {
    cancelled_ = true;
    for (Connection* connection : under_way_) {
      connection->cancelled = true;
      connection->Close();
    }
  }
  int64_t connections_opened() const { return connections_opened_; }

 private:
  std::shared_ptr<Connection> TakeIdle();
  asio::awaitable<error_code> Connect(Connection& connection);
  asio::awaitable<std::string> Handshake(Connection& connection);
  asio::awaitable<Exchange> Converse(Connection& connection, const std::string& message, BodyFunction on_body,
                                     bool& reusable);

  asio::io_context& context_;
  const Endpoint server_;
  const std::string fixed_head_;  // of every request, after the target
  std::vector<tcp::endpoint> endpoints_;
  size_t endpoint_ = 0;                            // the one that answered last
  std::vector<std::shared_ptr<Connection>> idle_;  // shared with the handlers of their deadlines
  std::set<Connection*> under_way_;
  bool cancelled_ = false;
  int64_t connections_opened_ = 0;
};

absl::Status StreamClient::Impl::Resolve() {
  const Url& url = server_.url;
  tcp::resolver resolver(context_);
  asio::steady_timer timer(context_, kResolveTimeout);
  error_code failure = asio::error::timed_out;
  timer.async_wait([&](error_code error) {
    if (!error) context_.stop();  // getaddrinfo itself cannot be cancelled
  });
  resolver.async_resolve(url.host, url.port, [&](error_code error, const tcp::resolver::results_type& found) {
    failure = error;
    for (const auto& entry : found) endpoints_.push_back(entry.endpoint());
    timer.cancel();
  });
  context_.restart();
  context_.run();
  if (failure == asio::error::timed_out)
    return absl::DeadlineExceededError(StrCat("cannot look up ", url.host, ": no answer"));
  if (failure || endpoints_.empty())
    return absl::UnavailableError(StrCat("cannot look up ", url.host, ": ", failure.message()));
  return absl::OkStatus();
}

std::shared_ptr<Connection> StreamClient::Impl::TakeIdle() {
  while (!idle_.empty()) {
    std::shared_ptr<Connection> connection = std::move(idle_.back());
    idle_.pop_back();
    if (connection->Usable()) return connection;
    connection->Close();
  }
  return nullptr;
}

asio::awaitable<error_code> StreamClient::Impl::Connect(Connection& connection) {
  error_code last;
  for (size_t i = 0; i < endpoints_.size() && !connection.timed_out && !connection.cancelled; ++i) {
    const size_t at = (endpoint_ + i) % endpoints_.size();
    connection.Close();
    auto [error] = co_await connection.stream.tcp().async_connect(endpoints_[at], kToken);
    if (!error) {
      endpoint_ = at;
      ++connections_opened_;
      connection.stream.tcp().set_option(tcp::no_delay(true), last);
      co_return error_code();
    }
    last = error;
  }
  co_return last;
}

// Why it failed; empty: it did not.
asio::awaitable<std::string> StreamClient::Impl::Handshake(Connection& connection) {
  auto& tls = connection.stream.Encrypt(server_.tls.get());
  SetServerName(tls.native_handle(), server_);
  auto [error] = co_await tls.async_handshake(asio::ssl::stream_base::client, kToken);
  co_return error ? HandshakeError(tls.native_handle(), error.message()) : std::string();
}

asio::awaitable<Exchange> StreamClient::Impl::Send(const std::string& path, const std::string& json,
                                                   Clock::time_point deadline, BodyFunction on_body) {
  std::string message = StrCat(json.empty() ? "GET " : "POST ", server_.url.path, path, fixed_head_);
  if (!json.empty())
    StrAppend(&message, "content-type: application/json\r\ncontent-length: ", json.size(), "\r\n");
  StrAppend(&message, "\r\n", json);

  Exchange exchange;
  if (cancelled_) {
    exchange.ending = Ending::kCancelled;
    co_return exchange;
  }
  std::shared_ptr<Connection> connection = TakeIdle();
  const bool fresh = connection == nullptr;
  if (fresh) connection = std::make_shared<Connection>(context_);
  under_way_.insert(connection.get());
  connection->Arm(deadline);
  bool reusable = false;
  error_code error;
  if (fresh) error = co_await Connect(*connection);
  std::string untrusted;
  if (fresh && !error && server_.tls != nullptr) untrusted = co_await Handshake(*connection);
  if (!untrusted.empty()) {
    exchange.ending = Ending::kConnectFailed;
    exchange.detail = std::move(untrusted);
  } else if (error) {
    exchange.ending = error == asio::error::connection_refused ? Ending::kRefused : Ending::kConnectFailed;
    exchange.detail = error.message();
  } else {
    exchange = co_await Converse(*connection, message, on_body, reusable);
  }
  under_way_.erase(connection.get());
  connection->timer.cancel();
  if (exchange.ending != Ending::kWhole) {
    // Both close the socket, so whatever failed failed because of them.
    if (connection->timed_out) exchange.ending = Ending::kTimeout;
    if (connection->cancelled) exchange.ending = Ending::kCancelled;
  }
  if (reusable && !connection->timed_out && !connection->cancelled) {
    idle_.push_back(std::move(connection));
  } else {
    connection->Close();
  }
  co_return exchange;
}

asio::awaitable<Exchange> StreamClient::Impl::Converse(Connection& connection, const std::string& message,
                                                       BodyFunction on_body, bool& reusable) {
  Exchange exchange;
  error_code error;
  {
    auto [write_error, bytes] = co_await asio::async_write(connection.stream, asio::buffer(message), kToken);
    // A server may refuse a body before it has read it, and close: its answer is still there to be read.
    error = write_error == asio::error::operation_aborted ? write_error : error_code();
  }
  // The body is handed over and emptied after every read: it never holds more than what one read brought.
  http::response_parser<http::string_body> parser;
  parser.eager(true);
  parser.body_limit(boost::none);
  parser.header_limit(kHeadBytesMax);
  bool enough = false;
  while (!error && !parser.is_done()) {
    auto [read_error, bytes] =
        co_await connection.stream.async_read_some(connection.buffer.prepare(kReadBytes), kToken);
    connection.buffer.commit(bytes);
    if (read_error == asio::error::eof && parser.got_some()) {
      parser.put_eof(error);  // an answer without length ends this way; any other is cut off
    } else {
      error = read_error;
    }
    while (!error && connection.buffer.size() > 0 && !parser.is_done()) {
      connection.buffer.consume(parser.put(connection.buffer.data(), error));
    }
    if (error == http::error::need_more) error = {};
    if (!parser.is_header_done()) continue;
    exchange.status = static_cast<int>(parser.get().result_int());
    std::string& body = parser.get().body();
    if (body.empty() || enough) continue;
    const Verdict verdict = on_body(exchange.status, body);
    body.clear();
    if (verdict == Verdict::kGiveUp) {
      exchange.ending = Ending::kWhole;
      co_return exchange;
    }
    if (verdict == Verdict::kEnough) {
      enough = true;
      if (!parser.is_done()) connection.Arm(std::min(connection.timer.expiry(), Clock::now() + kTailTimeout));
    }
  }
  if (enough || (!error && parser.is_done())) {
    exchange.ending = Ending::kWhole;
    reusable = !error && parser.is_done() && parser.keep_alive() && connection.buffer.size() == 0;
    co_return exchange;
  }
  exchange.ending = Ending::kBroken;
  exchange.detail = exchange.status == 0 ? "no answer: " : "the answer broke off: ";
  exchange.detail +=
      OneLine(error == asio::error::eof ? "the server closed the connection" : error.message());
  co_return exchange;
}

absl::StatusOr<std::unique_ptr<StreamClient>> StreamClient::Create(asio::io_context& context,
                                                                   const Endpoint& server,
                                                                   const std::string& api_key) {
  auto impl = std::make_unique<Impl>(context, server, api_key);
  MK_RETURN_IF_ERROR(impl->Resolve());
  return std::unique_ptr<StreamClient>(new StreamClient(std::move(impl)));
}

StreamClient::StreamClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StreamClient::~StreamClient() = default;

asio::awaitable<Exchange> StreamClient::Send(const std::string& path, const std::string& json,
                                             Clock::time_point deadline, BodyFunction on_body) {
  return impl_->Send(path, json, deadline, on_body);
}
void StreamClient::CancelAll() { impl_->CancelAll(); }
int64_t StreamClient::connections_opened() const { return impl_->connections_opened(); }

}  // namespace minke::cli::bench
