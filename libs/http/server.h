// An HTTP/1.1 server, with TLS or without, that holds thousands of open streams on a few threads
// (Boost.Beast, C++20 coroutines). Each connection belongs to one I/O thread; long work (large bodies) runs
// on worker threads. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/http/exchange.h"
#include "libs/tls/identity.h"

namespace minke {

struct HttpServerOptions {
  std::string listen = "127.0.0.1:8000";  // HOST:PORT; [HOST]:PORT for IPv6; port 0: any free one
  int io_threads = 2;
  int worker_threads = 2;                               // parse and tokenise bodies above inline_body_bytes
  int64_t inline_body_bytes = 16 << 10;                 // tokenised in well under a millisecond
  int64_t body_bytes_max = 16 << 20;                    // above: 413
  int64_t body_bytes_total_max = int64_t{1} << 30;      // of all requests being read; above: 503
  uint32_t header_bytes_max = 64 << 10;                 // above: 431
  int connections_max = 16384;                          // above: 503 and closed
  std::shared_ptr<tls::Identity> identity = nullptr;    // with TLS; null: without
  std::chrono::milliseconds handshake_timeout{10'000};  // of TLS, from the connection's first byte on
  std::chrono::milliseconds idle_timeout{120'000};      // between two requests
  std::chrono::milliseconds header_timeout{20'000};     // first byte to the end of the head
  std::chrono::milliseconds body_timeout{120'000};      // the whole body
  std::chrono::milliseconds write_timeout{30'000};      // a client that reads nothing for so long is dropped
  // After an answer that came before the whole body: read on so that the client gets to the answer.
  std::chrono::milliseconds drain_timeout{30'000};
  int64_t drain_bytes_max = int64_t{1} << 30;
  std::chrono::milliseconds farewell_timeout{2'000};  // TLS: for the client's word that it is over, too
};

class HttpServer {
 public:
  // Listens and starts the threads. `handler` is borrowed and outlives the server.
  // INVALID_ARGUMENT: not an address; FAILED_PRECONDITION: it cannot be listened on, such as a port in use.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(HttpServerOptions options, HttpHandler* handler);
  ~HttpServer();  // Shutdown(0) if it was not called

  int port() const;
  int connections() const;
  int64_t failed_handshakes() const;  // of TLS, since the start
  // Stops accepting, lets open requests finish until `grace` has passed, then drops them; joins the threads.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  class Impl;
  explicit HttpServer(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // shared with the connections
};

}  // namespace minke
