// What TLS adds to the server; its HTTP is tested where it is used (services/gateway/gateway_http_test.cc).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/mutex.h"
#include "libs/base/strings.h"
#include "libs/http/server.h"
#include "libs/tls/testing/certificates.h"

namespace minke {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using Clock = std::chrono::steady_clock;

bool AwaitThat(const std::function<bool()>& condition, absl::Duration limit = absl::Seconds(10)) {
  for (const absl::Time end = absl::Now() + limit; absl::Now() < end; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return condition();
}

// GET /hello; POST /echo; POST /never is not answered; POST /stream sends what Push is given.
class Handler final : public HttpHandler {
 public:
  std::unique_ptr<Exchange> HandleHead(const HttpRequest& head) override {
    if (head.method == "GET") return std::make_unique<Answer>(200, "hello");
    if (head.path == "/no") return std::make_unique<Answer>(403, "no");
    return nullptr;
  }
  std::unique_ptr<Exchange> Handle(HttpRequest request, std::function<void()> wake) override {
    if (request.path == "/echo") return std::make_unique<Answer>(200, std::move(request.body));
    const MutexLock lock(mutex_);
    wake_ = std::move(wake);
    ++open_;
    return std::make_unique<Waiting>(*this, request.path == "/stream");
  }
  std::unique_ptr<Exchange> BodyTooLarge(int64_t) override { return std::make_unique<Answer>(413, "large"); }
  std::unique_ptr<Exchange> Refuse(int status, const std::string& reason) override {
    return std::make_unique<Answer>(status, reason);
  }
  void OnAnswer(const HttpRequest&, int) override {}

  int open() {
    const MutexLock lock(mutex_);
    return open_;
  }
  void Push(const std::string& text, bool last) {
    const MutexLock lock(mutex_);
    pushed_ += text;
    last_ = last;
    if (wake_) wake_();
  }

 private:
  class Answer final : public Exchange {
   public:
    Answer(int status, std::string body) : status_(status), body_(std::move(body)) {}
    void Poll(Output* out) override {
      *out = {HttpHead{.status = status_, .content_type = "text/plain"}, std::move(body_), true};
    }
    Clock::time_point deadline() const override { return Clock::time_point::max(); }

   private:
    const int status_;
    std::string body_;
  };
  class Waiting final : public Exchange {
   public:
    Waiting(Handler& handler, bool stream) : handler_(handler), stream_(stream) {}
    ~Waiting() override {
      const MutexLock lock(handler_.mutex_);
      --handler_.open_;
    }
    void Poll(Output* out) override {
      if (!stream_) return;
      const MutexLock lock(handler_.mutex_);
      if (!std::exchange(begun_, true)) out->head = HttpHead{.content_type = "text/plain", .stream = true};
      out->body = std::exchange(handler_.pushed_, "");
      out->done = handler_.last_;
    }
    Clock::time_point deadline() const override { return Clock::time_point::max(); }

   private:
    Handler& handler_;
    const bool stream_;
    bool begun_ = false;
  };

  Mutex mutex_;
  std::function<void()> wake_ ABSL_GUARDED_BY(mutex_);
  std::string pushed_ ABSL_GUARDED_BY(mutex_);
  bool last_ ABSL_GUARDED_BY(mutex_) = false;
  int open_ ABSL_GUARDED_BY(mutex_) = 0;
};

struct ClientOptions {
  std::string ca;             // PEM; what the server has to be signed by
  tls::Issued own;            // its certificate; empty: none
  int version_max = 0;        // of TLS; 0: the newest
  std::vector<uint8_t> alpn;  // as on the wire; empty: none
};

// One connection; every wait ends after 20 s.
class Client {
 public:
  explicit Client(int port) {
    fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
    const timeval limit{.tv_sec = 20};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    ::setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    sockaddr_in to{.sin_family = AF_INET,
                   .sin_port = htons(static_cast<uint16_t>(port)),
                   .sin_addr = {htonl(INADDR_LOOPBACK)}};
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  }
  ~Client() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
    ::close(fd_);
  }

  // Whether the server was accepted. That it accepts us shows with the first answer.
  bool Handshake(const ClientOptions& options) {
    context_ = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_verify(context_, SSL_VERIFY_PEER, nullptr);
    const auto with_pem = [](const std::string& pem, const auto& use) {
      BIO* const bio = BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()));
      use(bio);
      BIO_free(bio);
    };
    with_pem(options.ca, [&](BIO* bio) {
      X509* const ca = PEM_read_bio_X509(bio, nullptr, nullptr, nullptr);
      X509_STORE_add_cert(SSL_CTX_get_cert_store(context_), ca);
      X509_free(ca);
    });
    if (!options.own.key.empty()) {
      with_pem(options.own.certificate, [&](BIO* bio) {
        X509* const own = PEM_read_bio_X509(bio, nullptr, nullptr, nullptr);
        SSL_CTX_use_certificate(context_, own);
        X509_free(own);
      });
      with_pem(options.own.key, [&](BIO* bio) {
        EVP_PKEY* const key = PEM_read_bio_PrivateKey(bio, nullptr, nullptr, nullptr);
        SSL_CTX_use_PrivateKey(context_, key);
        EVP_PKEY_free(key);
      });
    }
    if (options.version_max != 0) {
      SSL_CTX_set_max_proto_version(context_, options.version_max);
      SSL_CTX_set_security_level(context_, 0);  // so that it is the server that refuses
    }
    if (!options.alpn.empty())
      SSL_CTX_set_alpn_protos(context_, options.alpn.data(), static_cast<unsigned>(options.alpn.size()));
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, fd_);
    return SSL_connect(ssl_) == 1;
  }

  bool Send(const std::string& text) {
    if (ssl_ != nullptr) return SSL_write(ssl_, text.data(), static_cast<int>(text.size())) > 0;
    return ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
  }
  // Empty: the end.
  std::string Receive() {
    char piece[16 << 10];
    const ssize_t got =
        ssl_ != nullptr ? SSL_read(ssl_, piece, sizeof piece) : ::recv(fd_, piece, sizeof piece, 0);
    if (got <= 0)
      clean_end_ = ssl_ != nullptr && SSL_get_error(ssl_, static_cast<int>(got)) == SSL_ERROR_ZERO_RETURN;
    return got > 0 ? std::string(piece, static_cast<size_t>(got)) : "";
  }
  std::string ReceiveUntil(const std::string& what) {
    std::string all;
    while (all.find(what) == std::string::npos) {
      const std::string more = Receive();
      if (more.empty()) return all + "<end>";
      all += more;
    }
    return all;
  }
  std::string ReceiveAll() { return ReceiveUntil("<never>"); }
  bool clean_end() const { return clean_end_; }
  int64_t serial() const {
    X509* const theirs = SSL_get1_peer_certificate(ssl_);
    int64_t serial = 0;
    if (theirs != nullptr) ASN1_INTEGER_get_int64(&serial, X509_get0_serialNumber(theirs));
    X509_free(theirs);
    return serial;
  }
  std::string protocol() const {
    const unsigned char* chosen = nullptr;
    unsigned length = 0;
    SSL_get0_alpn_selected(ssl_, &chosen, &length);
    return std::string(reinterpret_cast<const char*>(chosen), length);
  }
  // Says that it is over, as programs that end in order do, and ends.
  void Leave() {
    SSL_shutdown(ssl_);
    ::shutdown(fd_, SHUT_RDWR);
  }

 private:
  int fd_ = -1;
  SSL_CTX* context_ = nullptr;
  SSL* ssl_ = nullptr;
  bool clean_end_ = false;
};

const std::string kGet = "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
std::string Post(const std::string& path, const std::string& body) {
  return StrCat("POST ", path, " HTTP/1.1\r\nhost: x\r\ncontent-length: ", body.size(), "\r\n\r\n", body);
}

class HttpTls : public testing::TestWithParam<int> {
 protected:
  HttpTls() {
    ::signal(SIGPIPE, SIG_IGN);  // OpenSSL writes to connections that may be gone
    folder_.WriteAll(ca_, ca_.Issue({.serial = 0xA1}));
  }
  ~HttpTls() override {
    if (server_ != nullptr) server_->Shutdown(std::chrono::milliseconds(0));
  }

  void Start(bool client_certificates, HttpServerOptions options = {}) {
    tls::Files files{{"--http-tls-cert", folder_.path("cert.pem")},
                     {"--http-tls-key", folder_.path("key.pem")},
                     {"--http-tls-client-ca"}};
    if (client_certificates) files.ca.path = folder_.path("ca.pem");
    auto identity = tls::Identity::Open(files, tls::Use::kServer, {.period = absl::Milliseconds(10)});
    ASSERT_TRUE(identity.ok()) << identity.status();
    options.listen = "127.0.0.1:0";
    options.identity = identity_ = *std::move(identity);
    auto server = HttpServer::Start(std::move(options), &handler_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  ClientOptions Believer() const { return {.ca = ca_.certificate(), .version_max = GetParam()}; }

  tls::TestCa ca_;
  tls::CertificateFolder folder_;
  Handler handler_;
  std::shared_ptr<tls::Identity> identity_;
  std::unique_ptr<HttpServer> server_;
};

INSTANTIATE_TEST_SUITE_P(Versions, HttpTls, testing::Values(TLS1_2_VERSION, TLS1_3_VERSION));

TEST_P(HttpTls, PlainHttpIsToldToUseHttps) {
  Start(false);
  Client client(server_->port());
  client.Send(kGet);
  EXPECT_THAT(client.ReceiveAll(), testing::AllOf(StartsWith("HTTP/1.1 400 Bad Request\r\n"),
                                                  HasSubstr("\"expected https, found http\"")));
  EXPECT_EQ(server_->failed_handshakes(), 1);
}

TEST_P(HttpTls, SilentSlowAndGarbageClientsHoldNothing) {
  Start(false, {.handshake_timeout = std::chrono::milliseconds(500)});
  Client silent(server_->port()), slow(server_->port()), garbage(server_->port()), half(server_->port());
  garbage.Send(std::string(4000, '\x16'));
  half.Send(std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 9));  // the beginning of a client's hello
  std::atomic<bool> stop{false};
  std::thread dripping([&] {  // a byte now and then is no progress
    for (char byte : std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00\x00", 16)) {
      if (stop) return;
      slow.Send(std::string(1, byte));
      absl::SleepFor(absl::Milliseconds(100));
    }
  });
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(AwaitThat([&] { return server_->connections() == 0 && server_->failed_handshakes() == 4; }));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  stop = true;
  dripping.join();
}

TEST_P(HttpTls, OldVersionsAndOtherProtocolsAreRefused) {
  Start(false);
  EXPECT_FALSE(Client(server_->port()).Handshake({.ca = ca_.certificate(), .version_max = TLS1_1_VERSION}));
  ClientOptions options = Believer();
  options.alpn = {2, 'h', '2'};
  EXPECT_FALSE(Client(server_->port()).Handshake(options));
  options.alpn = {2, 'h', '2', 8, 'h', 't', 't', 'p', '/', '1', '.', '1'};
  Client client(server_->port());
  ASSERT_TRUE(client.Handshake(options));
  EXPECT_EQ(client.protocol(), "http/1.1");
}

TEST_P(HttpTls, ClientsNeedACertificateOfTheCa) {
  Start(true);
  const auto ask = [&](const tls::Issued& own) {
    ClientOptions options = Believer();
    options.own = own;
    Client client(server_->port());
    if (!client.Handshake(options) || !client.Send(kGet)) return std::string("refused");
    const std::string answer = client.ReceiveUntil("hello");
    return answer == "<end>" ? "refused" : answer.substr(0, 15);
  };
  EXPECT_EQ(ask({}), "refused");
  EXPECT_EQ(ask(tls::TestCa("other").Issue()), "refused");
  EXPECT_EQ(ask(ca_.Issue({.usage = "serverAuth"})), "refused");
  EXPECT_EQ(ask(ca_.Issue({.begin = -absl::Hours(2), .end = -absl::Hours(1)})), "refused");
  EXPECT_EQ(ask(ca_.Issue()), "HTTP/1.1 200 OK");
  EXPECT_TRUE(AwaitThat([&] { return server_->failed_handshakes() == 4; }));
}

TEST_P(HttpTls, RequestsFollowEachOtherOnOneConnection) {
  Start(false);
  Client client(server_->port());
  ASSERT_TRUE(client.Handshake(Believer()));
  const std::string large(3 << 20, 'x');
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Send(kGet));
    EXPECT_THAT(client.ReceiveUntil("hello"), HasSubstr("connection: keep-alive"));
    ASSERT_TRUE(client.Send(Post("/echo", large + "<echo>")));
    EXPECT_THAT(client.ReceiveUntil("<echo>"), HasSubstr(large));
  }
  // The next request before the answer: while the server looks out for our leaving.
  ASSERT_TRUE(client.Send(Post("/stream", "") + kGet + Post("/echo", "pipelined")));
  EXPECT_TRUE(AwaitThat([&] { return handler_.open() == 1; }));
  absl::SleepFor(absl::Milliseconds(50));
  handler_.Push("piece one", false);
  EXPECT_THAT(client.ReceiveUntil("piece one"), HasSubstr("transfer-encoding: chunked"));
  handler_.Push("piece two", true);
  EXPECT_THAT(client.ReceiveUntil("pipelined"),
              testing::ContainsRegex("piece two.*\r\n0\r\n\r\nHTTP/1.1 200.*hello.*pipelined"));
}

TEST_P(HttpTls, AClientThatLeavesIsNoticed) {
  Start(false);
  for (const bool in_order : {true, false}) {
    auto client = std::make_unique<Client>(server_->port());
    ASSERT_TRUE(client->Handshake(Believer()));
    ASSERT_TRUE(client->Send(Post("/never", "body")));
    EXPECT_TRUE(AwaitThat([&] { return handler_.open() == 1; }));
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_EQ(handler_.open(), 1);
    if (in_order) client->Leave();
    client.reset();
    EXPECT_TRUE(AwaitThat([&] { return handler_.open() == 0 && server_->connections() == 0; })) << in_order;
  }
}

TEST_P(HttpTls, TheEndIsSaid) {
  Start(false);
  Client client(server_->port());
  ASSERT_TRUE(client.Handshake(Believer()));
  ASSERT_TRUE(client.Send("GET /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"));
  EXPECT_THAT(client.ReceiveAll(), HasSubstr("hello"));
  EXPECT_TRUE(client.clean_end());
  client.Leave();
  EXPECT_TRUE(AwaitThat([&] { return server_->connections() == 0; }));
}

TEST_P(HttpTls, AnAnswerBeforeTheWholeBodyArrives) {
  Start(false, {.body_bytes_max = 1000});
  Client client(server_->port());
  ASSERT_TRUE(client.Handshake(Believer()));
  ASSERT_TRUE(client.Send("POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n"));
  for (int i = 0; i < 30; ++i) ASSERT_TRUE(client.Send(std::string(100'000, 'x')));  // nobody wants it
  EXPECT_THAT(client.ReceiveUntil("large"), StartsWith("HTTP/1.1 413"));
}

TEST_P(HttpTls, CertificatesAreReplacedUnderAStream) {
  Start(false);
  Client before(server_->port());
  ASSERT_TRUE(before.Handshake(Believer()));
  EXPECT_EQ(before.serial(), 0xA1);
  ASSERT_TRUE(before.Send(Post("/stream", "")));
  handler_.Push("one", false);
  EXPECT_THAT(before.ReceiveUntil("one"), HasSubstr("200"));

  const tls::Issued next = ca_.Issue({.serial = 0xA2});
  folder_.Write("cert.pem", next.certificate);  // half of the pair
  absl::SleepFor(absl::Milliseconds(200));
  Client between(server_->port());
  ASSERT_TRUE(between.Handshake(Believer()));
  EXPECT_EQ(between.serial(), 0xA1);
  folder_.Write("key.pem", next.key);
  ASSERT_TRUE(AwaitThat([&] { return identity_->current()->serial == "A2"; }));
  Client after(server_->port());
  ASSERT_TRUE(after.Handshake(Believer()));
  EXPECT_EQ(after.serial(), 0xA2);
  ASSERT_TRUE(after.Send(kGet));
  EXPECT_THAT(after.ReceiveUntil("hello"), HasSubstr("200"));

  handler_.Push("two", true);
  EXPECT_THAT(before.ReceiveUntil("two"), HasSubstr("two"));
  ASSERT_TRUE(before.Send(kGet));  // its connection goes on
  EXPECT_THAT(before.ReceiveUntil("hello"), HasSubstr("200"));
}

TEST_P(HttpTls, StoppingEndsHandshakesIdleAndStreamingClients) {
  Start(false);
  Client silent(server_->port()), idle(server_->port()), streaming(server_->port());
  ASSERT_TRUE(idle.Handshake(Believer()));
  ASSERT_TRUE(streaming.Handshake(Believer()));
  ASSERT_TRUE(streaming.Send(Post("/stream", "")));
  EXPECT_TRUE(AwaitThat([&] { return server_->connections() == 3 && handler_.open() == 1; }));
  const absl::Time begin = absl::Now();
  server_->Shutdown(std::chrono::milliseconds(300));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  EXPECT_EQ(server_->connections(), 0);
}

}  // namespace
}  // namespace minke
