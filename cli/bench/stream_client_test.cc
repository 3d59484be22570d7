#include "cli/bench/stream_client.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <thread>
#include <vector>

namespace minke::cli::bench {
namespace {

namespace asio = boost::asio;
using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

// Listens on a port of its own; each accepted connection runs `script` on the server's thread, one after the
// other.
class Server {
 public:
  explicit Server(int connections, std::function<void(int fd)> script) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 16), 0);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, connections, script = std::move(script)] {
      for (int i = 0; i < connections; ++i) {
        const int fd = accept(listener_, nullptr, nullptr);
        if (fd < 0) return;
        script(fd);
        close(fd);
      }
    });
  }
  ~Server() {
    shutdown(listener_, SHUT_RDWR);
    thread_.join();
    close(listener_);
  }
  Url url() const { return {"127.0.0.1", std::to_string(port_), "/v1"}; }

 private:
  int listener_ = -1;
  int port_ = 0;
  std::thread thread_;
};

// The request's bytes, to the end of its JSON body "{}" or of its head; empty when the client is gone.
std::string ReadRequest(int fd) {
  std::string text;
  char byte;
  while (!text.ends_with("\r\n\r\n{}") && !(text.starts_with("GET") && text.ends_with("\r\n\r\n"))) {
    if (recv(fd, &byte, 1, 0) <= 0) return "";
    text += byte;
  }
  return text;
}
void WriteText(int fd, const std::string& text) { send(fd, text.data(), text.size(), MSG_NOSIGNAL); }
void WaitForLeaving(int fd) {
  std::vector<char> ignored(1 << 16);
  while (recv(fd, ignored.data(), ignored.size(), 0) > 0) {
  }
}

const std::string kHead = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

struct Seen {
  Exchange exchange;
  std::string body;
  steady_clock::duration took{};
};

// Sends one request after the other through one client.
struct Caller {
  explicit Caller(const Url& url, const std::string& key = "") {
    auto created = StreamClient::Create(context, {url}, key);
    EXPECT_TRUE(created.ok()) << created.status();
    client = *std::move(created);
  }
  Seen Call(milliseconds timeout = seconds(10), Verdict verdict = Verdict::kMore,
            const std::string& json = "{}") {
    Seen seen;
    const std::string path = "/completions";
    const auto take = [&](int, std::string_view piece) {
      seen.body += piece;
      return verdict;
    };
    const StreamClient::BodyFunction on_body = take;
    const auto begin = steady_clock::now();
    asio::co_spawn(
        context,
        [&]() -> asio::awaitable<void> {
          seen.exchange = co_await client->Send(path, json, begin + timeout, on_body);
        },
        [](std::exception_ptr failure) { EXPECT_EQ(failure, nullptr); });
    context.restart();
    context.run();
    seen.took = steady_clock::now() - begin;
    return seen;
  }
  asio::io_context context{1};
  std::unique_ptr<StreamClient> client;
};

TEST(StreamClient, NobodyListens) {
  Url url;
  {
    url = Server(0, [](int) {}).url();
  }
  EXPECT_EQ(Caller(url).Call().exchange.ending, Ending::kRefused);
}

TEST(StreamClient, NoSuchHost) {
  asio::io_context context;
  EXPECT_EQ(StreamClient::Create(context, {{"no-such-host.invalid", "80"}}, "").status().code(),
            absl::StatusCode::kUnavailable);
}

TEST(StreamClient, ASilentServerTimesOut) {
  Server server(2, [](int fd) { WaitForLeaving(fd); });
  Caller caller(server.url());
  const Seen seen = caller.Call(milliseconds(100));
  EXPECT_EQ(seen.exchange.ending, Ending::kTimeout);
  EXPECT_EQ(seen.exchange.status, 0);
  EXPECT_GE(seen.took, milliseconds(100));
  EXPECT_LT(seen.took, seconds(5));
  EXPECT_EQ(caller.Call(milliseconds(10)).exchange.ending, Ending::kTimeout);  // on a new connection
}

TEST(StreamClient, SilenceInTheMiddleTimesOutToo) {
  Server server(1, [](int fd) {
    ReadRequest(fd);
    WriteText(fd, kHead + "5\r\nhello\r\n");
    WaitForLeaving(fd);
  });
  const Seen seen = Caller(server.url()).Call(milliseconds(200));
  EXPECT_EQ(seen.exchange.ending, Ending::kTimeout);
  EXPECT_EQ(seen.exchange.status, 200);
  EXPECT_EQ(seen.body, "hello");
}

TEST(StreamClient, BrokenAnswers) {
  for (const std::string& text : {std::string(), std::string("HTTP/1.1 2"), std::string("rubbish\r\n\r\n"),
                                  kHead + "5\r\nhel", kHead + "5\r\nhello\r\n", kHead + "zz\r\n",
                                  std::string("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello"),
                                  "HTTP/1.1 200 OK\r\nx: " + std::string(100'000, 'x')}) {
    Server server(1, [&](int fd) {
      ReadRequest(fd);
      WriteText(fd, text);
    });
    const Seen seen = Caller(server.url()).Call();
    EXPECT_EQ(seen.exchange.ending, Ending::kBroken) << text.substr(0, 50);
    EXPECT_FALSE(seen.exchange.detail.empty());
  }
}

TEST(StreamClient, TheRequestIsPlainHttp) {
  std::string request;
  Server server(1, [&](int fd) {
    request = ReadRequest(fd);
    WriteText(fd, "HTTP/1.1 204 No Content\r\n\r\n");
  });
  EXPECT_EQ(Caller(server.url(), "sk-key").Call().exchange.status, 204);
  EXPECT_TRUE(request.starts_with("POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")) << request;
  EXPECT_NE(request.find("\r\nauthorization: Bearer sk-key\r\n"), std::string::npos) << request;
  EXPECT_NE(request.find("\r\ncontent-length: 2\r\n"), std::string::npos) << request;
}

TEST(StreamClient, AnswersByteByByteInAllFramings) {
  for (const std::string& text : {kHead + "3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
                                  std::string("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
                                  std::string("HTTP/1.1 200 OK\r\n\r\nhello")}) {
    Server server(1, [&](int fd) {
      ReadRequest(fd);
      for (const char c : text) {
        WriteText(fd, std::string(1, c));
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    });
    const Seen seen = Caller(server.url()).Call();
    EXPECT_EQ(seen.exchange.ending, Ending::kWhole) << seen.exchange.detail;
    EXPECT_EQ(seen.body, "hello");
  }
}

TEST(StreamClient, AConnectionIsUsedAgainUntilTheServerClosesIt) {
  Server server(2, [](int fd) {
    for (int i = 0; i < 3 && !ReadRequest(fd).empty(); ++i) WriteText(fd, kHead + "2\r\nok\r\n0\r\n\r\n");
  });
  Caller caller(server.url());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(caller.Call().body, "ok");
  EXPECT_EQ(caller.client->connections_opened(), 1);
  std::this_thread::sleep_for(milliseconds(50));  // the server has closed it by then
  for (int i = 0; i < 3; ++i) EXPECT_EQ(caller.Call().body, "ok");
  EXPECT_EQ(caller.client->connections_opened(), 2);
}

TEST(StreamClient, EnoughDoesNotWaitForAServerThatNeverEnds) {
  Server server(2, [](int fd) {
    ReadRequest(fd);
    WriteText(fd, kHead + "2\r\nok\r\n");
    WaitForLeaving(fd);
  });
  Caller caller(server.url());
  for (int i = 0; i < 2; ++i) {
    const Seen seen = caller.Call(seconds(10), Verdict::kEnough);
    EXPECT_EQ(seen.exchange.ending, Ending::kWhole);
    EXPECT_EQ(seen.body, "ok");
    EXPECT_LT(seen.took, seconds(5));
  }
}

TEST(StreamClient, EnoughKeepsTheConnectionOfAServerThatEndsSoon) {
  Server server(1, [](int fd) {
    for (int i = 0; i < 2; ++i) {
      ReadRequest(fd);
      WriteText(fd, kHead + "2\r\nok\r\n");
      std::this_thread::sleep_for(milliseconds(10));
      WriteText(fd, "0\r\n\r\n");
    }
    WaitForLeaving(fd);
  });
  Caller caller(server.url());
  for (int i = 0; i < 2; ++i)
    EXPECT_EQ(caller.Call(seconds(10), Verdict::kEnough).exchange.ending, Ending::kWhole);
  EXPECT_EQ(caller.client->connections_opened(), 1);
}

TEST(StreamClient, GivingUpClosesTheConnection) {
  Server server(2, [](int fd) {
    ReadRequest(fd);
    WriteText(fd, kHead + "2\r\nok\r\n");
    WaitForLeaving(fd);
  });
  Caller caller(server.url());
  for (int i = 0; i < 2; ++i)
    EXPECT_EQ(caller.Call(seconds(10), Verdict::kGiveUp).exchange.ending, Ending::kWhole);
  EXPECT_EQ(caller.client->connections_opened(), 2);
}

TEST(StreamClient, AnEarlyRefusalOfALargeBodyIsRead) {
  Server server(1, [](int fd) {
    char head[64];
    recv(fd, head, sizeof head, 0);
    WriteText(fd, "HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno");
    shutdown(fd, SHUT_WR);
    WaitForLeaving(fd);
  });
  const Seen seen = Caller(server.url()).Call(seconds(10), Verdict::kMore, std::string(8 << 20, ' '));
  EXPECT_EQ(seen.exchange.status, 413);
  EXPECT_EQ(seen.body, "no");
}

TEST(StreamClient, CancelAllEndsWhatIsUnderWayAndWhatComes) {
  Server server(1, [](int fd) { WaitForLeaving(fd); });
  Caller caller(server.url());
  asio::steady_timer timer(caller.context, milliseconds(50));
  timer.async_wait([&](boost::system::error_code) { caller.client->CancelAll(); });
  EXPECT_EQ(caller.Call().exchange.ending, Ending::kCancelled);
  EXPECT_EQ(caller.Call().exchange.ending, Ending::kCancelled);
}

}  // namespace
}  // namespace minke::cli::bench
