#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <functional>

#include "absl/time/clock.h"
#include "libs/base/strings.h"
#include "libs/tls/identity.h"
#include "libs/tls/material.h"
#include "libs/tls/testing/certificates.h"

namespace minke::tls {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

bool AwaitThat(const std::function<bool()>& condition, absl::Duration limit = absl::Seconds(10)) {
  for (const absl::Time end = absl::Now() + limit; absl::Now() < end; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return condition();
}

class TlsFiles : public testing::Test {
 protected:
  TlsFiles() { folder_.WriteAll(ca_, ca_.Issue({.serial = 0xA1})); }

  std::string Error(Use use = Use::kPeer) const {
    const auto material = Load(files_, use);
    EXPECT_FALSE(material.ok());
    const std::string message(material.status().message());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_THAT(message, Not(HasSubstr("BEGIN")));
    return message;
  }
  std::string ErrorOf(const IssueOptions& options, Use use = Use::kPeer) {
    folder_.WriteAll(ca_, ca_.Issue(options));
    return Error(use);
  }

  TestCa ca_;
  CertificateFolder folder_;
  Files files_{.certificate = {"--tls-cert", folder_.path("cert.pem")},
               .key = {"--tls-key", folder_.path("key.pem")},
               .ca = {"--tls-ca", folder_.path("ca.pem")}};
};

TEST_F(TlsFiles, TheFlagThatIsMissingIsNamed) {
  const Files none{{"--tls-cert"}, {"--tls-key"}, {"--tls-ca"}};
  EXPECT_TRUE(none.empty());
  const auto with = [&](bool certificate, bool key, bool ca, Use use) {
    Files files = none;
    if (certificate) files.certificate.path = "c";
    if (key) files.key.path = "k";
    if (ca) files.ca.path = "a";
    return std::string(CheckComplete(files, use).message());
  };
  EXPECT_EQ(with(true, false, true, Use::kPeer), "--tls-cert: expected --tls-key beside it, found none");
  EXPECT_EQ(with(false, true, true, Use::kPeer), "--tls-key: expected --tls-cert beside it, found none");
  EXPECT_EQ(with(true, true, false, Use::kPeer), "--tls-cert: expected --tls-ca beside it, found none");
  EXPECT_EQ(with(false, false, true, Use::kServer), "--tls-ca: expected --tls-cert beside it, found none");
  EXPECT_EQ(with(true, false, false, Use::kClient), "--tls-cert: expected --tls-key beside it, found none");
  EXPECT_EQ(with(false, false, true, Use::kClient), "");
  EXPECT_EQ(with(true, true, false, Use::kServer), "");
  EXPECT_EQ(with(true, true, true, Use::kPeer), "");
}

TEST_F(TlsFiles, MissingAndUnreadableFilesAreNamed) {
  ::unlink(folder_.path("key.pem").c_str());
  EXPECT_EQ(Error(), StrCat("--tls-key ", folder_.path("key.pem"),
                            ": expected a readable file, found: No such file or directory"));
  std::filesystem::create_directory(folder_.path("key.pem"));
  EXPECT_THAT(Error(), HasSubstr("Is a directory"));
  std::filesystem::remove(folder_.path("key.pem"));
  ASSERT_EQ(::mkfifo(folder_.path("key.pem").c_str(), 0600), 0);  // nobody ever writes: no reason to wait
  EXPECT_THAT(Error(), HasSubstr("found none"));
}

TEST_F(TlsFiles, EmptyGarbageAndCutOffFilesAreRefused) {
  folder_.Write("cert.pem", "");
  EXPECT_THAT(Error(), HasSubstr("cert.pem: expected certificates in PEM, found none"));
  folder_.Write("cert.pem", std::string(100, '\xff'));
  EXPECT_THAT(Error(), HasSubstr("found none"));
  const Issued issued = ca_.Issue();
  folder_.Write("cert.pem", issued.certificate.substr(0, issued.certificate.size() / 2));
  EXPECT_THAT(Error(), HasSubstr("cert.pem: expected certificates in PEM, found a malformed one"));
  std::string flipped = issued.certificate;
  flipped[flipped.size() / 2] = '!';
  folder_.Write("cert.pem", flipped);
  EXPECT_THAT(Error(), HasSubstr("found a malformed one"));
  // A whole certificate, and a piece of the next one of its chain.
  folder_.Write("cert.pem", issued.certificate + ca_.certificate().substr(0, 200));
  EXPECT_THAT(Error(), HasSubstr("found a malformed one"));
  folder_.WriteAll(ca_, issued);
  folder_.Write("ca.pem", issued.key);
  EXPECT_THAT(Error(), HasSubstr("ca.pem: expected certificates in PEM, found none"));
  folder_.Write("ca.pem", std::string((1 << 20) + 1, '\n'));
  EXPECT_THAT(Error(), HasSubstr("ca.pem: expected at most 1048576 bytes, found more"));
}

TEST_F(TlsFiles, AKeyHasToBeAPlainOneAndTheCertificates) {
  const Issued issued = ca_.Issue(), other = ca_.Issue();
  folder_.WriteAll(ca_, issued);
  folder_.Write("key.pem", other.key);
  EXPECT_EQ(Error(), StrCat("--tls-key ", folder_.path("key.pem"),
                            ": expected the key of the certificate in --tls-cert ", folder_.path("cert.pem"),
                            ", found another one"));
  folder_.Write("key.pem", issued.encrypted_key);
  EXPECT_THAT(Error(), HasSubstr("expected an unencrypted private key in PEM, found an encrypted one"));
  folder_.Write("key.pem", issued.certificate);
  EXPECT_THAT(Error(), HasSubstr("expected an unencrypted private key in PEM, found none"));
}

TEST_F(TlsFiles, CertificatesHaveToBeValidNow) {
  EXPECT_THAT(
      ErrorOf({.begin = -absl::Hours(2), .end = -absl::Hours(1)}),
      AllOf(HasSubstr("cert.pem: expected a certificate that is valid now, found one that expired at 20"),
            HasSubstr("Z")));
  EXPECT_THAT(ErrorOf({.begin = absl::Hours(1), .end = absl::Hours(2)}),
              HasSubstr("found one that is valid from"));
  folder_.WriteAll(TestCa("old", -absl::Hours(1)), ca_.Issue());
  EXPECT_THAT(Error(), HasSubstr("ca.pem: expected a CA that is valid now, found none"));
  // Beside its successor an old one does no harm.
  folder_.Write("ca.pem", TestCa("old", -absl::Hours(1)).certificate() + ca_.certificate());
  EXPECT_TRUE(Load(files_, Use::kPeer).ok());
}

TEST_F(TlsFiles, CertificatesHaveToBeGoodForTheirUse) {
  EXPECT_THAT(
      ErrorOf({.usage = "serverAuth"}),
      HasSubstr(
          "expected a certificate for servers and clients (extended key usage), found one for servers only"));
  EXPECT_THAT(ErrorOf({.usage = "clientAuth"}, Use::kServer), HasSubstr("found one for clients only"));
  EXPECT_THAT(ErrorOf({.usage = "emailProtection"}, Use::kClient), HasSubstr("for neither"));
  folder_.WriteAll(ca_, ca_.Issue({.usage = ""}));  // as cert-manager makes them
  EXPECT_TRUE(Load(files_, Use::kPeer).ok());
}

TEST_F(TlsFiles, AWholeSetIsRead) {
  const auto material = Load(files_, Use::kPeer);
  ASSERT_TRUE(material.ok()) << material.status();
  EXPECT_EQ((*material)->serial, "A1");
  EXPECT_GT((*material)->not_after, absl::Now() + absl::Hours(23));
  EXPECT_NE((*material)->http_server, nullptr);
  EXPECT_NE((*material)->http_client, nullptr);
  Files only_ca{.certificate = {"--cert"}, .key = {"--key"}, .ca = files_.ca};
  EXPECT_TRUE(Load(only_ca, Use::kClient).ok());
}

class TlsIdentity : public TlsFiles {
 protected:
  void Open() {
    auto identity = Identity::Open(files_, Use::kPeer, {.period = absl::Milliseconds(10)});
    ASSERT_TRUE(identity.ok()) << identity.status();
    identity_ = *std::move(identity);
  }
  std::string serial() const { return identity_->current()->serial; }
  // Whether it stays so for longer than the files take to be noticed.
  bool Stays(const std::string& serial_wanted) const {
    return !AwaitThat([&] { return serial() != serial_wanted; }, absl::Milliseconds(300));
  }
  std::shared_ptr<Identity> identity_;
};

TEST_F(TlsIdentity, BrokenFilesAtTheStartAreAnError) {
  folder_.Write("key.pem", "");
  EXPECT_EQ(Identity::Open(files_, Use::kPeer).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(TlsIdentity, NewFilesAreUsedAndTheOldOnesLiveOnInWhatHoldsThem) {
  Open();
  const auto before = identity_->current();
  folder_.WriteAll(ca_, ca_.Issue({.serial = 0xA2}));
  EXPECT_TRUE(AwaitThat([&] { return serial() == "A2"; }));
  EXPECT_EQ(before->serial, "A1");
  EXPECT_NE(before->http_server, identity_->current()->http_server);
  TestCa other("other");
  folder_.Write("ca.pem", other.certificate());  // the CA alone
  EXPECT_TRUE(AwaitThat([&] { return identity_->current()->ca == other.certificate(); }));
}

TEST_F(TlsIdentity, AHalfWrittenPairIsNeverUsed) {
  Open();
  const Issued next = ca_.Issue({.serial = 0xA2});
  folder_.Write("cert.pem", next.certificate);
  EXPECT_TRUE(Stays("A1"));
  folder_.Write("key.pem", next.key.substr(0, next.key.size() / 2));
  EXPECT_TRUE(Stays("A1"));
  folder_.Write("key.pem", next.key);
  EXPECT_TRUE(AwaitThat([&] { return serial() == "A2"; }));
}

TEST_F(TlsIdentity, BrokenExpiredAndMissingFilesLeaveWhatWasThere) {
  Open();
  folder_.Write("cert.pem", "not a certificate");
  EXPECT_TRUE(Stays("A1"));
  folder_.WriteAll(ca_, ca_.Issue({.end = -absl::Minutes(1), .serial = 0xA3}));
  EXPECT_TRUE(Stays("A1"));
  ::unlink(folder_.path("cert.pem").c_str());
  EXPECT_TRUE(Stays("A1"));
  folder_.WriteAll(ca_, ca_.Issue({.serial = 0xA4}));
  EXPECT_TRUE(AwaitThat([&] { return serial() == "A4"; }));
}

// Kubernetes mounts a secret as links into a folder that is a link itself, and replaces that one.
TEST_F(TlsIdentity, FilesBehindALinkThatIsReplacedAreFollowed) {
  const auto version = [&](const char* name, int64_t number) {
    const std::string folder = folder_.path(name);
    std::filesystem::create_directory(folder);
    const Issued issued = ca_.Issue({.serial = number});
    folder_.Write(StrCat(name, "/tls.crt"), issued.certificate);
    folder_.Write(StrCat(name, "/tls.key"), issued.key);
    folder_.Write(StrCat(name, "/ca.crt"), ca_.certificate());
    const std::string fresh = folder_.path("..data_tmp");
    std::filesystem::create_symlink(folder, fresh);
    std::filesystem::rename(fresh, folder_.path("..data"));
  };
  version("v1", 0xB1);
  files_ = {{"--tls-cert", folder_.path("..data/tls.crt")},
            {"--tls-key", folder_.path("..data/tls.key")},
            {"--tls-ca", folder_.path("..data/ca.crt")}};
  Open();
  EXPECT_EQ(serial(), "B1");
  version("v2", 0xB2);
  EXPECT_TRUE(AwaitThat([&] { return serial() == "B2"; }));
}

}  // namespace
}  // namespace minke::tls
