#include "libs/tracing/http_post.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <utility>

#include "libs/base/strings.h"

namespace minke::tracing {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;

constexpr uint64_t kAnswerBytesMax = 64 << 10;

// Asio's asynchronous calls, run to their end or to the deadline: its blocking ones know no time.
class Exchange {
 public:
  Exchange(const HttpEndpoint& endpoint, std::string_view content_type, std::string body)
      : endpoint_(endpoint), request_(http::verb::post, endpoint.path, 11) {
    request_.set(http::field::host, endpoint.host);
    request_.set(http::field::content_type, beast::string_view(content_type.data(), content_type.size()));
    request_.keep_alive(false);
    request_.body() = std::move(body);
    request_.prepare_payload();
    parser_.body_limit(kAnswerBytesMax);
  }

  absl::Status Run(std::chrono::milliseconds timeout) {
    resolver_.async_resolve(endpoint_.host, endpoint_.port, [this](error_code error, const auto& found) {
      if (error) return End("resolve", error);
      stream_.async_connect(found, [this](error_code failed, const auto&) { OnConnect(failed); });
    });
    context_.run_for(timeout);
    if (!done_) return absl::UnavailableError(StrCat("no answer within ", timeout.count(), " ms"));
    return status_;
  }

 private:
  void OnConnect(error_code error) {
    if (error) return End("connect", error);
    http::async_write(stream_, request_, [this](error_code failed, size_t) {
      if (failed) return End("send", failed);
      http::async_read(stream_, buffer_, parser_, [this](error_code unread, size_t) { OnAnswer(unread); });
    });
  }

  void OnAnswer(error_code error) {
    if (error) return End("read the answer", error);
    done_ = true;
    const int code = static_cast<int>(parser_.get().result_int());
    if (code / 100 == 2) return;
    const std::string said = StrCat("answered with HTTP status ", code);
    const bool again = code == 429 || code == 502 || code == 503 || code == 504;
    status_ = again ? absl::UnavailableError(said) : absl::InvalidArgumentError(said);
  }

  void End(const char* what, error_code error) {
    done_ = true;
    status_ = absl::UnavailableError(StrCat(what, ": ", error.message()));
  }

  const HttpEndpoint& endpoint_;
  asio::io_context context_;
  asio::ip::tcp::resolver resolver_{context_};
  beast::tcp_stream stream_{context_};
  beast::flat_buffer buffer_;
  http::request<http::string_body> request_;
  http::response_parser<http::string_body> parser_;
  bool done_ = false;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<HttpEndpoint> ParseEndpoint(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  const auto bad = [&] {
    return absl::InvalidArgumentError(
        StrCat("the collector's address: expected http://HOST[:PORT][/PATH], found '", url, "'"));
  };
  if (url.compare(0, kScheme.size(), kScheme) != 0) return bad();
  std::string rest = url.substr(kScheme.size());
  HttpEndpoint endpoint{.port = "4318"};
  if (const size_t slash = rest.find('/'); slash != std::string::npos) {
    endpoint.path = rest.substr(slash);
    rest.resize(slash);
  }
  while (!endpoint.path.empty() && endpoint.path.back() == '/') endpoint.path.pop_back();
  endpoint.path += "/v1/traces";
  const size_t colon = rest.rfind(':');
  const bool bracketed = !rest.empty() && rest.front() == '[';
  if (colon != std::string::npos && (!bracketed || colon > rest.rfind(']'))) {
    endpoint.port = rest.substr(colon + 1);
    rest.resize(colon);
  }
  if (bracketed) {
    if (rest.back() != ']') return bad();
    rest = rest.substr(1, rest.size() - 2);
  }
  endpoint.host = rest;
  const bool good_port = !endpoint.port.empty() && endpoint.port.size() <= 5 &&
                         endpoint.port.find_first_not_of("0123456789") == std::string::npos;
  if (endpoint.host.empty() || !good_port || url.find_first_of(" \r\n") != std::string::npos) return bad();
  return endpoint;
}

absl::Status Post(const HttpEndpoint& endpoint, std::string_view content_type, std::string body,
                  std::chrono::milliseconds timeout) {
  return Exchange(endpoint, content_type, std::move(body)).Run(timeout);
}

}  // namespace minke::tracing
