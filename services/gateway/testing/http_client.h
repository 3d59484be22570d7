// A blocking HTTP/1.1 client on a plain socket, for tests that care about bytes and about leaving early.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace minke::gateway {

class TestClient {
 public:
  explicit TestClient(int port, int receive_buffer = 0) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    const timeval timeout{30, 0};  // a test that waits longer has failed
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~TestClient() { Close(); }
  TestClient(const TestClient&) = delete;
  TestClient& operator=(const TestClient&) = delete;

  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  // As much as the other side takes.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }
  bool Request(const std::string& method, const std::string& path, const std::string& body = "",
               const std::string& headers = "") {
    std::string text = method + " " + path + " HTTP/1.1\r\nhost: test\r\n" + headers;
    if (!body.empty()) text += "content-length: " + std::to_string(body.size()) + "\r\n";
    return Send(text + "\r\n" + body);
  }

  struct Answer {
    int status = 0;  // 0: no answer
    std::map<std::string, std::string> headers;
    std::string body;
    nlohmann::json json() const { return nlohmann::json::parse(body, nullptr, false); }
    std::string param() const { return json()["error"]["param"].is_string() ? json()["error"]["param"] : ""; }
    std::string code() const { return json()["error"]["code"].is_string() ? json()["error"]["code"] : ""; }
  };
  // Status and headers.
  Answer ReadHead() {
    Answer answer;
    std::string line = ReadLine();
    if (line.size() < 12) return answer;
    answer.status = std::stoi(line.substr(9, 3));
    while (!(line = ReadLine()).empty()) {
      const size_t colon = line.find(": ");
      std::string name = line.substr(0, colon);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      answer.headers[name] = line.substr(colon + 2);
    }
    const auto encoding = answer.headers.find("transfer-encoding");
    chunked_ = encoding != answer.headers.end() && encoding->second == "chunked";
    return answer;
  }
  Answer Read(bool head_only = false) {
    Answer answer = ReadHead();
    if (head_only || answer.status == 0) return answer;
    if (chunked_) {
      while (auto chunk = ReadChunk()) answer.body += *chunk;
    } else if (answer.headers.contains("content-length")) {
      answer.body = ReadBytes(std::stoul(answer.headers["content-length"]));
    }
    return answer;
  }
  // The next server-sent event's data; nullopt at the end of the stream, or of the connection.
  std::optional<std::string> ReadEvent() {
    for (;;) {
      if (const size_t end = events_.find("\n\n"); end != std::string::npos) {
        std::string data = events_.substr(6, end - 6);  // "data: "
        events_.erase(0, end + 2);
        return data;
      }
      auto chunk = ReadChunk();
      if (!chunk) return std::nullopt;
      events_ += *chunk;
    }
  }
  // All there is until the other side closes.
  std::string ReadToEnd() {
    while (Fill()) {
    }
    return std::exchange(buffer_, "");
  }
  // Nothing more comes.
  bool AtEnd() { return buffer_.empty() && !Fill(); }

 private:
  bool Fill() {
    char bytes[65536];
    const ssize_t got = recv(fd_, bytes, sizeof(bytes), 0);
    if (got <= 0) return false;
    buffer_.append(bytes, static_cast<size_t>(got));
    return true;
  }
  std::string ReadLine() {
    for (;;) {
      if (const size_t end = buffer_.find("\r\n"); end != std::string::npos) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 2);
        return line;
      }
      if (!Fill()) return "";
    }
  }
  std::string ReadBytes(size_t count) {
    while (buffer_.size() < count && Fill()) {
    }
    std::string bytes = buffer_.substr(0, count);
    buffer_.erase(0, bytes.size());
    return bytes;
  }
  std::optional<std::string> ReadChunk() {
    const std::string line = ReadLine();
    if (line.empty()) return std::nullopt;
    const size_t size = std::stoul(line, nullptr, 16);
    std::string chunk = ReadBytes(size);
    ReadLine();
    if (size == 0) return std::nullopt;
    return chunk;
  }

  int fd_ = -1;
  bool connected_ = false;
  bool chunked_ = false;
  std::string buffer_, events_;
};

}  // namespace minke::gateway
