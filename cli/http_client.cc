#include "cli/http_client.h"

#include <poll.h>
#include <sys/socket.h>

#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = asio::ip::tcp;
using boost::system::error_code;

// A connection each wait of which ends: Asio's own blocking calls look at no timeout, SO_RCVTIMEO neither.
class TimedStream {
 public:
  explicit TimedStream(absl::Duration timeout)
      : timeout_ms_(static_cast<int>(absl::ToInt64Milliseconds(timeout))), socket_(context_) {}

  absl::Status Connect(const Endpoint& to) {
    const Url& url = to.url;
    error_code error;
    const auto endpoints = tcp::resolver(context_).resolve(url.host, url.port, error);
    for (const auto& endpoint : endpoints) {
      ConnectTo(endpoint.endpoint(), error);
      if (!error) break;
    }
    if (!error) return to.tls == nullptr ? absl::OkStatus() : Handshake(to);
    return absl::UnavailableError(StrCat("cannot reach ", url.host, ":", url.port, ": ", error.message()));
  }

  // What Beast wants of a stream.
  template <typename Buffers>
  size_t read_some(const Buffers& buffers, error_code& error) {
    if (tls_ != nullptr) {
      const asio::mutable_buffer buffer = *asio::buffer_sequence_begin(buffers);
      return TryTls(
          error, [&](size_t& done) { return SSL_read_ex(tls_.get(), buffer.data(), buffer.size(), &done); });
    }
    return Try(POLLIN, error, [&] { return socket_.read_some(buffers, error); });
  }
  template <typename Buffers>
  size_t write_some(const Buffers& buffers, error_code& error) {
    if (tls_ != nullptr) {
      for (const asio::const_buffer buffer : beast::buffers_range_ref(buffers)) {
        if (buffer.size() == 0) continue;
        return TryTls(error, [&](size_t& done) {
          return SSL_write_ex(tls_.get(), buffer.data(), buffer.size(), &done);
        });
      }
      return 0;
    }
    return Try(POLLOUT, error, [&] { return socket_.write_some(buffers, error); });
  }
  // Named by Beast's requirements, and never called: they would throw.
  template <typename Buffers>
  size_t read_some(const Buffers& buffers);
  template <typename Buffers>
  size_t write_some(const Buffers& buffers);

 private:
  void ConnectTo(const tcp::endpoint& endpoint, error_code& error) {
    socket_ = tcp::socket(context_);
    socket_.open(endpoint.protocol(), error);
    if (!error) socket_.non_blocking(true, error);
    if (error) return;
    if (::connect(socket_.native_handle(), endpoint.data(), static_cast<socklen_t>(endpoint.size())) == 0)
      return;
    int reason = errno;
    if (reason == EINPROGRESS && Ready(POLLOUT, error)) {
      socklen_t size = sizeof reason;
      ::getsockopt(socket_.native_handle(), SOL_SOCKET, SO_ERROR, &reason, &size);
    }
    if (!error && reason != 0) error.assign(reason, boost::system::system_category());
  }

  absl::Status Handshake(const Endpoint& to) {
    tls_.reset(SSL_new(to.tls.get()));
    SSL_set_fd(tls_.get(), static_cast<int>(socket_.native_handle()));
    SetServerName(tls_.get(), to);
    error_code error;
    TryTls(error, [&](size_t&) { return SSL_connect(tls_.get()); });
    if (!error) return absl::OkStatus();
    return absl::UnavailableError(
        StrCat("no TLS with ", to.url.HostPort(), ": ", HandshakeError(tls_.get(), error.message())));
  }

  // Returns how many bytes went, after `call` has returned 1; it may want to wait either way.
  template <typename Call>
  size_t TryTls(error_code& error, const Call& call) {
    while (true) {
      size_t done = 0;
      error = {};
      errno = 0;
      ERR_clear_error();
      const int result = call(done);
      if (result == 1) return done;
      switch (SSL_get_error(tls_.get(), result)) {
        case SSL_ERROR_WANT_READ:
          if (!Ready(POLLIN, error)) return 0;
          continue;
        case SSL_ERROR_WANT_WRITE:
          if (!Ready(POLLOUT, error)) return 0;
          continue;
        case SSL_ERROR_ZERO_RETURN:
          error = asio::error::eof;
          return 0;
        case SSL_ERROR_SSL:
          error.assign(static_cast<int>(ERR_peek_last_error()), asio::error::get_ssl_category());
          return 0;
        default:
          error =
              errno == 0 ? error_code(asio::error::eof) : error_code(errno, boost::system::system_category());
          return 0;
      }
    }
  }

  bool Ready(short what, error_code& error) {
    pollfd fd{socket_.native_handle(), what, 0};
    if (::poll(&fd, 1, timeout_ms_) > 0) return true;
    error = asio::error::timed_out;
    return false;
  }

  template <typename Call>
  size_t Try(short what, error_code& error, const Call& call) {
    while (true) {
      const size_t bytes = call();
      if (error != asio::error::would_block && error != asio::error::try_again) return bytes;
      error = {};
      if (!Ready(what, error)) return 0;
    }
  }

  const int timeout_ms_;
  asio::io_context context_;
  tcp::socket socket_;
  struct FreeSsl {
    void operator()(SSL* ssl) const { SSL_free(ssl); }
  };
  std::unique_ptr<SSL, FreeSsl> tls_;  // null: plaintext
};

absl::Status ReadError(const error_code& error) {
  return absl::UnavailableError(StrCat("the server stopped answering: ", error.message()));
}

}  // namespace

std::string ErrorText(const std::string& body) {
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
  if (json.is_object() && json.contains("error") && json["error"].is_object() &&
      json["error"].contains("message") && json["error"]["message"].is_string()) {
    return json["error"]["message"].get<std::string>();
  }
  return body;
}

absl::StatusOr<HttpAnswer> HttpGet(const Endpoint& endpoint, const std::string& target,
                                   absl::Duration timeout, const std::string& api_key) {
  TimedStream socket(timeout);
  MK_RETURN_IF_ERROR(socket.Connect(endpoint));
  http::request<http::empty_body> request{http::verb::get, target, 11};
  request.set(http::field::host, endpoint.url.host);
  request.keep_alive(false);
  if (!api_key.empty()) request.set(http::field::authorization, "Bearer " + api_key);
  error_code error;
  http::write(socket, request, error);
  if (error) return ReadError(error);
  beast::flat_buffer buffer;
  http::response<http::string_body> response;
  http::read(socket, buffer, response, error);
  if (error) return ReadError(error);
  return HttpAnswer{static_cast<int>(response.result_int()), response.body()};
}

absl::Status HttpPostEvents(const Endpoint& endpoint, const std::string& target, const std::string& json,
                            const std::string& api_key, absl::Duration silence_max,
                            absl::FunctionRef<bool(const std::string&)> on_data) {
  TimedStream socket(silence_max);
  MK_RETURN_IF_ERROR(socket.Connect(endpoint));
  http::request<http::string_body> request{http::verb::post, target, 11};
  request.set(http::field::host, endpoint.url.host);
  request.set(http::field::content_type, "application/json");
  if (!api_key.empty()) request.set(http::field::authorization, "Bearer " + api_key);
  request.body() = json;
  request.prepare_payload();
  error_code error;
  http::write(socket, request, error);
  if (error) return ReadError(error);

  beast::flat_buffer buffer;
  http::response_parser<http::buffer_body> parser;
  parser.body_limit(boost::none);
  http::read_header(socket, buffer, parser, error);
  if (error) return ReadError(error);
  const bool good = parser.get().result() == http::status::ok;
  std::string pending;
  char piece[8192];
  while (!parser.is_done()) {
    parser.get().body().data = piece;
    parser.get().body().size = sizeof piece;
    http::read_some(socket, buffer, parser, error);
    if (error == http::error::need_buffer) error = {};
    if (error) return ReadError(error);
    pending.append(piece, sizeof piece - parser.get().body().size);
    if (!good) continue;
    for (size_t end = pending.find('\n'); end != std::string::npos; end = pending.find('\n')) {
      const std::string line = pending.substr(0, end);
      pending.erase(0, end + 1);
      if (line.rfind("data: ", 0) == 0 && !on_data(line.substr(6))) return absl::OkStatus();
    }
  }
  if (!good) return absl::FailedPreconditionError(ErrorText(pending));
  return absl::OkStatus();
}

}  // namespace minke::cli
