#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "libs/base/strings.h"
#include "libs/rpc/credentials.h"
#include "libs/rpc/grpc_server.h"
#include "libs/tls/testing/certificates.h"
#include "proto/cluster/cluster.grpc.pb.h"

namespace minke::rpc {
namespace {

using cluster::v1::ClusterUpdate;
using cluster::v1::MemberReport;
using cluster::v1::Membership;
using tls::CertificateFolder;
using tls::Identity;
using tls::TestCa;

// Answers every report.
class Echo final : public Membership::Service {
  grpc::Status Join(grpc::ServerContext*,
                    grpc::ServerReaderWriter<ClusterUpdate, MemberReport>* stream) override {
    MemberReport report;
    while (stream->Read(&report)) {
      ClusterUpdate update;
      update.set_lease_ms(7);
      if (!stream->Write(update)) break;
    }
    return grpc::Status::OK;
  }
};

std::string SerialOf(const std::string& pem) {
  BIO* const bio = BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()));
  X509* const certificate = PEM_read_bio_X509(bio, nullptr, nullptr, nullptr);
  std::string serial;
  if (certificate != nullptr) {
    int64_t number = 0;
    ASN1_INTEGER_get_int64(&number, X509_get0_serialNumber(certificate));
    serial = absl::StrCat(absl::Hex(number));
  }
  X509_free(certificate);
  BIO_free(bio);
  return serial;
}

class RpcTls : public testing::Test {
 protected:
  RpcTls() {
    server_files_.WriteAll(ca_, ca_.Issue({.serial = 0xA1}));
    client_files_.WriteAll(ca_, ca_.Issue({.serial = 0xC1}));
    server_identity_ = OpenAt(server_files_);
    auto server = GrpcServer::Start("127.0.0.1:0", {&echo_}, server_identity_);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    address_ = StrCat("127.0.0.1:", server_->port());
  }
  ~RpcTls() override { server_->Shutdown(absl::Seconds(1)); }

  static std::shared_ptr<Identity> OpenAt(const CertificateFolder& folder, tls::Use use = tls::Use::kPeer,
                                          std::string peer_name = "") {
    tls::Files files{{"--tls-cert", folder.path("cert.pem")},
                     {"--tls-key", folder.path("key.pem")},
                     {"--tls-ca", folder.path("ca.pem")}};
    auto identity =
        Identity::Open(files, use, {.peer_name = std::move(peer_name), .period = absl::Milliseconds(10)});
    EXPECT_TRUE(identity.ok()) << identity.status();
    return *identity;
  }

  // One exchange over the channel. The serial of the server's certificate, or the error.
  static std::string Ask(const std::shared_ptr<grpc::Channel>& channel) {
    const auto stub = Membership::NewStub(channel);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    const auto stream = stub->Join(&context);
    ClusterUpdate update;
    stream->Write(MemberReport());
    const bool answered = stream->Read(&update);
    stream->WritesDone();
    const grpc::Status status = stream->Finish();
    if (!answered || !status.ok()) return StrCat("error ", status.error_code(), ": ", status.error_message());
    for (const grpc::string_ref& pem : context.auth_context()->FindPropertyValues("x509_pem_cert"))
      return SerialOf(std::string(pem.data(), pem.size()));
    return "plaintext";
  }
  std::string AskAs(std::shared_ptr<Identity> identity) const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return Ask(SecureChannel(address_, std::move(identity), arguments).Get());
  }

  TestCa ca_;
  CertificateFolder server_files_, client_files_;
  Echo echo_;
  std::shared_ptr<Identity> server_identity_;
  std::unique_ptr<GrpcServer> server_;
  std::string address_;
};

TEST_F(RpcTls, BothSidesShowCertificates) { EXPECT_EQ(AskAs(OpenAt(client_files_)), "a1"); }

TEST_F(RpcTls, PlaintextIsRefused) { EXPECT_THAT(AskAs(nullptr), testing::HasSubstr("error 14")); }

TEST_F(RpcTls, AClientWithoutACertificateIsRefused) {
  grpc::SslCredentialsOptions options{.pem_root_certs = ca_.certificate()};
  EXPECT_THAT(Ask(grpc::CreateChannel(address_, grpc::SslCredentials(options))),
              testing::HasSubstr("error 14"));
}

// The gateway's public port.
TEST_F(RpcTls, AServerWithoutACaAsksForNoCertificate) {
  tls::Files files{{"--http-tls-cert", server_files_.path("cert.pem")},
                   {"--http-tls-key", server_files_.path("key.pem")},
                   {"--http-tls-client-ca"}};
  const auto identity = Identity::Open(files, tls::Use::kServer, {.period = absl::Milliseconds(10)});
  ASSERT_TRUE(identity.ok()) << identity.status();
  Echo echo;
  const auto server = GrpcServer::Start("127.0.0.1:0", {&echo}, *identity);
  ASSERT_TRUE(server.ok()) << server.status();
  grpc::SslCredentialsOptions options{.pem_root_certs = ca_.certificate()};
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto ask = [&] {
    return Ask(grpc::CreateCustomChannel(StrCat("127.0.0.1:", (*server)->port()),
                                         grpc::SslCredentials(options), arguments));
  };
  EXPECT_EQ(ask(), "a1");
  server_files_.WriteAll(ca_, ca_.Issue({.serial = 0xA2}));
  const absl::Time end = absl::Now() + absl::Seconds(10);
  while ((*identity)->current()->serial != "A2" && absl::Now() < end) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_EQ(ask(), "a2");
  (*server)->Shutdown(absl::Seconds(1));
}

TEST_F(RpcTls, CertificatesOfAnotherCaAreRefusedEitherWay) {
  TestCa other("other");
  CertificateFolder theirs;
  theirs.WriteAll(other, other.Issue());
  EXPECT_THAT(AskAs(OpenAt(theirs)), testing::HasSubstr("error 14"));  // we do not believe the server
  theirs.Write("ca.pem", ca_.certificate());
  EXPECT_THAT(AskAs(OpenAt(theirs)), testing::HasSubstr("error 14"));  // it does not believe us
}

TEST_F(RpcTls, TheServersNameHasToBeTheOneDialledOrTheClusters) {
  server_files_.WriteAll(ca_, ca_.Issue({.names = {"DNS:cluster.test"}, .serial = 0xA2}));
  const absl::Time end = absl::Now() + absl::Seconds(10);
  while (server_identity_->current()->serial != "A2" && absl::Now() < end)
    absl::SleepFor(absl::Milliseconds(5));
  EXPECT_THAT(AskAs(OpenAt(client_files_)), testing::HasSubstr("error 14"));
  EXPECT_EQ(AskAs(OpenAt(client_files_, tls::Use::kPeer, "cluster.test")), "a2");
  EXPECT_THAT(AskAs(OpenAt(client_files_, tls::Use::kPeer, "another.test")), testing::HasSubstr("error 14"));
}

TEST_F(RpcTls, CertificatesAreReplacedUnderAStream) {
  const std::shared_ptr<Identity> client_identity = OpenAt(client_files_);
  SecureChannel channel(address_, client_identity, grpc::ChannelArguments());
  const std::shared_ptr<grpc::Channel> first = channel.Get();
  const auto stub = Membership::NewStub(first);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
  const auto stream = stub->Join(&context);
  ClusterUpdate update;
  const auto exchange = [&] { return stream->Write(MemberReport()) && stream->Read(&update); };
  ASSERT_TRUE(exchange());

  // The whole PKI moves to another CA: first everybody believes both, then has new certificates.
  TestCa next("next");
  for (const CertificateFolder* folder : {&server_files_, &client_files_})
    folder->Write("ca.pem", ca_.certificate() + next.certificate());
  const auto await = [&](const std::shared_ptr<Identity>& identity, const auto& condition) {
    for (const absl::Time end = absl::Now() + absl::Seconds(10); absl::Now() < end;
         absl::SleepFor(absl::Milliseconds(5))) {
      if (condition(*identity->current())) return;
    }
    FAIL() << "the files were not noticed";
  };
  for (const auto& identity : {server_identity_, client_identity})
    await(identity,
          [&](const tls::Material& material) { return material.ca.size() > ca_.certificate().size(); });
  EXPECT_EQ(AskAs(client_identity), "a1");
  server_files_.Write("cert.pem", "");  // half-written: the old ones stay
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(AskAs(client_identity), "a1");
  const auto with_both = [&](const CertificateFolder& folder, int64_t serial) {
    const auto issued = next.Issue({.serial = serial});
    folder.Write("key.pem", issued.key);
    folder.Write("cert.pem", issued.certificate);
  };
  with_both(server_files_, 0xA2);
  await(server_identity_, [](const tls::Material& material) { return material.serial == "A2"; });
  EXPECT_EQ(AskAs(client_identity), "a2");
  with_both(client_files_, 0xC2);
  await(client_identity, [](const tls::Material& material) { return material.serial == "C2"; });
  EXPECT_NE(channel.Get(), first);
  EXPECT_EQ(channel.Get(), channel.Get());
  EXPECT_EQ(Ask(channel.Get()), "a2");

  EXPECT_TRUE(exchange());  // over the connection that was there
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(RpcTls, SilentAndGarbageConnectionsAreClosed) {
  const auto connect = [&] {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to{.sin_family = AF_INET,
                   .sin_port = htons(static_cast<uint16_t>(server_->port())),
                   .sin_addr = {htonl(INADDR_LOOPBACK)}};
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    const timeval limit{.tv_sec = kHandshakeTimeoutMs / 1000 + 10};
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
  };
  const auto ends = [](int fd) {  // not by our own limit
    char piece[4096];
    ssize_t got = 1;
    while (got > 0) got = ::recv(fd, piece, sizeof piece, 0);
    const bool closed = got == 0 || errno == ECONNRESET;
    ::close(fd);
    return closed;
  };
  const int silent = connect(), garbage = connect();
  const std::string noise(1000, 'x');
  ::send(garbage, noise.data(), noise.size(), MSG_NOSIGNAL);
  EXPECT_TRUE(ends(garbage));
  EXPECT_TRUE(ends(silent));
}

}  // namespace
}  // namespace minke::rpc
