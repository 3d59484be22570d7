// An asynchronous HTTP/1.1 client, with TLS or without, for one server: thousands of streamed answers on one
// thread, few system calls each.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "cli/client_tls.h"

namespace minke::cli::bench {

// How an exchange ended, as far as HTTP is concerned.
enum class Ending {
  kWhole,          // a whole answer, or the caller had enough of it
  kRefused,        // connection refused
  kConnectFailed,  // no connection for another reason
  kTimeout,
  kBroken,     // the connection broke, or what came is no HTTP
  kCancelled,  // by CancelAll
};

struct Exchange {
  Ending ending = Ending::kBroken;
  int status = 0;      // 0: no head arrived
  std::string detail;  // why it did not end well, one line
};

// What to do with an answer after a piece of its body.
enum class Verdict {
  kMore,
  kEnough,  // it is complete; the connection may be used again once the server has ended it, soon
  kGiveUp,  // it is worth nothing: the connection is closed
};

// Connections are kept and used again. A connection that the server has closed in the meantime is replaced
// without notice, but nothing that was sent is ever sent again: a lost request is an error to be counted. Its
// thread only.
class StreamClient {
 public:
  using BodyFunction = absl::FunctionRef<Verdict(int status, std::string_view piece)>;

  // Looks the host up: UNAVAILABLE if there is no such host, DEADLINE_EXCEEDED after kResolveTimeout. Runs
  // `context` until then. `context` outlives the client. `api_key` may be empty.
  static absl::StatusOr<std::unique_ptr<StreamClient>> Create(boost::asio::io_context& context,
                                                              const Endpoint& server,
                                                              const std::string& api_key);
  ~StreamClient();

  // POST of a JSON body, or GET if it is empty, to the URL's path followed by `path`. Ends by `deadline`.
  // `on_body` is called for each piece of the answer's body as it arrives, and lives until the end.
  // Takes references: keep named objects (GCC 12 destroys temporaries of co_await expressions twice).
  boost::asio::awaitable<Exchange> Send(const std::string& path, const std::string& json,
                                        std::chrono::steady_clock::time_point deadline, BodyFunction on_body);
  // All that are under way end now, kCancelled, and all that are still to come.
  void CancelAll();

  int64_t connections_opened() const;

  static constexpr std::chrono::seconds kResolveTimeout{10};
  // How long a server may take to end an answer of which the caller has had enough.
  static constexpr std::chrono::milliseconds kTailTimeout{100};

 private:
  class Impl;
  explicit StreamClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::cli::bench
