#include "cli/http_client.h"

#include <sys/socket.h>
#include <sys/time.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
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

absl::Status Connect(const Url& url, absl::Duration timeout, tcp::socket& socket, asio::io_context& context) {
  boost::system::error_code error;
  const auto endpoints = tcp::resolver(context).resolve(url.host, url.port, error);
  if (!error) asio::connect(socket, endpoints, error);
  if (error)
    return absl::UnavailableError(StrCat("cannot reach ", url.host, ":", url.port, ": ", error.message()));
  const timeval limit = absl::ToTimeval(timeout);
  ::setsockopt(socket.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(socket.native_handle(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  return absl::OkStatus();
}

absl::Status ReadError(const boost::system::error_code& error) {
  return absl::UnavailableError(StrCat("the server stopped answering: ", error.message()));
}

// The message of an OpenAI error object, or the text itself.
std::string ErrorText(const std::string& body) {
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
  if (json.is_object() && json.contains("error") && json["error"].is_object() &&
      json["error"].contains("message") && json["error"]["message"].is_string()) {
    return json["error"]["message"].get<std::string>();
  }
  return body;
}

}  // namespace

absl::StatusOr<HttpAnswer> HttpGet(const Url& url, const std::string& target, absl::Duration timeout) {
  asio::io_context context;
  tcp::socket socket(context);
  MK_RETURN_IF_ERROR(Connect(url, timeout, socket, context));
  http::request<http::empty_body> request{http::verb::get, target, 11};
  request.set(http::field::host, url.host);
  request.keep_alive(false);
  boost::system::error_code error;
  http::write(socket, request, error);
  if (error) return ReadError(error);
  beast::flat_buffer buffer;
  http::response<http::string_body> response;
  http::read(socket, buffer, response, error);
  if (error) return ReadError(error);
  return HttpAnswer{static_cast<int>(response.result_int()), response.body()};
}

absl::Status HttpPostEvents(const Url& url, const std::string& target, const std::string& json,
                            const std::string& api_key, absl::Duration silence_max,
                            absl::FunctionRef<bool(const std::string&)> on_data) {
  asio::io_context context;
  tcp::socket socket(context);
  MK_RETURN_IF_ERROR(Connect(url, silence_max, socket, context));
  http::request<http::string_body> request{http::verb::post, target, 11};
  request.set(http::field::host, url.host);
  request.set(http::field::content_type, "application/json");
  if (!api_key.empty()) request.set(http::field::authorization, "Bearer " + api_key);
  request.body() = json;
  request.prepare_payload();
  boost::system::error_code error;
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
