// A connection that is encrypted or is not, as is decided when it begins: one type for both, so that what
// reads and writes is written once. An Asio stream (AsyncReadStream, AsyncWriteStream).
#pragma once

#include <openssl/ssl.h>

#include <boost/asio/ssl/stream.hpp>
#include <optional>
#include <utility>

namespace minke {

// `Tcp`: what is below, an Asio stream too. Thread-compatible; one read and one write at a time.
template <typename Tcp>
class HttpStream {
 public:
  using executor_type = typename Tcp::executor_type;
  using Tls = boost::asio::ssl::stream<Tcp&>;

  explicit HttpStream(Tcp tcp) : tcp_(std::move(tcp)) {}
  HttpStream(const HttpStream&) = delete;
  HttpStream& operator=(const HttpStream&) = delete;

  // From here on what is read and written is encrypted; the handshake is the caller's to do. REQUIRES: not
  // encrypted yet, nothing is under way.
  Tls& Encrypt(SSL_CTX* context) { return tls_.emplace(tcp_, SSL_new(context)); }
  bool encrypted() const { return tls_.has_value(); }
  Tls& tls() { return *tls_; }  // REQUIRES: encrypted()
  Tcp& tcp() { return tcp_; }
  executor_type get_executor() { return tcp_.get_executor(); }

  template <typename Buffers, typename Token>
  auto async_read_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_read_some(buffers, std::forward<Token>(token));
    return tcp_.async_read_some(buffers, std::forward<Token>(token));
  }
  template <typename Buffers, typename Token>
  auto async_write_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_write_some(buffers, std::forward<Token>(token));
    return tcp_.async_write_some(buffers, std::forward<Token>(token));
  }

 private:
  Tcp tcp_;
  std::optional<Tls> tls_;
};

}  // namespace minke
