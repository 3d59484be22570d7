// The seam between the HTTP server and what it serves: a request goes in, an Exchange writes the answer as
// far as it is known whenever it is asked to. No HTTP library in sight.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace minke {

struct HttpRequest {
  std::string method;
  std::string path;           // without query, percent-decoded
  std::string authorization;  // header fields
  std::string if_none_match;
  std::string request_id;   // the client's own if it is sane, else made here; in every answer
  std::string traceparent;  // as the client sent it
  std::string body;
  std::chrono::steady_clock::time_point arrived = std::chrono::steady_clock::now();  // its head
};

struct HttpHead {
  int status = 200;
  std::string content_type = "application/json";
  bool stream = false;    // the body comes in pieces, and its length is not known ahead
  int retry_after_s = 0;  // 0: no Retry-After
  std::string allow;      // empty: no Allow
  std::vector<std::pair<std::string, std::string>> fields = {};  // more header fields, names in lower case
};

// One request being answered. All calls come from one thread at a time. Destroying it before it is done means
// the client left: whatever works for it is cancelled.
class Exchange {
 public:
  struct Output {
    std::optional<HttpHead> head;  // set once, before or with the first bytes of the body
    std::string body;              // to send now; of an answer that is no stream: all of it
    bool done = false;
  };
  virtual ~Exchange() = default;
  // Takes what can be sent. Nothing, and not done: ask again after `wake`, or at the deadline.
  virtual void Poll(Output* out) = 0;
  // When Poll wants to be called even if nothing happens.
  virtual std::chrono::steady_clock::time_point deadline() const = 0;
};

// Thread-safe.
class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  // The answer if the head alone decides it (GET, errors); nullptr: read the body, then call Handle.
  virtual std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) = 0;
  // May take long with a large body. `wake` may be called from any thread, also after the exchange is gone.
  virtual std::unique_ptr<Exchange> Handle(HttpRequest request, std::function<void()> wake) = 0;
  // The answer to a body larger than `body_bytes_max`, and to what the server itself cannot go on with.
  virtual std::unique_ptr<Exchange> BodyTooLarge(int64_t body_bytes_max) = 0;
  virtual std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) = 0;
  // Told of every answer whose head is about to be sent.
  virtual void OnAnswer(const HttpRequest& request, int status) = 0;
};

}  // namespace minke
