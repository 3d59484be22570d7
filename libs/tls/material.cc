#include "libs/tls/material.h"

#include <fcntl.h>
#include <openssl/asn1.h>
#include <openssl/bn.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/tls/context.h"
#include "libs/tls/openssl.h"

namespace minke::tls {
namespace {

using Certificates = std::vector<CertificatePtr>;

std::string Name(const File& file) { return StrCat(file.flag, " ", file.path); }

absl::Status Refuse(const File& file, std::string_view expected, std::string_view found) {
  return absl::InvalidArgumentError(StrCat(Name(file), ": expected ", expected, ", found ", found));
}

absl::StatusOr<std::string> ReadText(const File& file) {
  if (file.path.empty()) return std::string();
  const auto unreadable = [&] {
    return absl::NotFoundError(
        StrCat(Name(file), ": expected a readable file, found: ", std::string(std::strerror(errno))));
  };
  const int fd = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not hold us up
  if (fd < 0) return unreadable();
  const absl::Cleanup close = [fd] { ::close(fd); };
  std::string text;
  char piece[16 << 10];
  while (true) {
    const ssize_t got = ::read(fd, piece, sizeof piece);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return unreadable();
    if (got == 0) return text;
    text.append(piece, static_cast<size_t>(got));
    if (static_cast<int64_t>(text.size()) > kFileBytesMax) {
      return Refuse(file, StrCat("at most ", kFileBytesMax, " bytes"), "more");
    }
  }
}

BioPtr Open(const std::string& text) {
  return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

absl::StatusOr<Certificates> ParseCertificates(const std::string& text, const File& file) {
  Certificates certificates;
  const BioPtr bio = Open(text);
  ERR_clear_error();
  while (true) {
    CertificatePtr certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (certificate == nullptr) break;
    certificates.push_back(std::move(certificate));
  }
  const bool at_the_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (!at_the_end) return Refuse(file, "certificates in PEM", "a malformed one");
  if (certificates.empty()) return Refuse(file, "certificates in PEM", "none");
  return certificates;
}

// A key in a file with a passphrase: there is nobody to ask.
int NoPassphrase(char*, int, int, void* asked) {
  *static_cast<bool*>(asked) = true;
  return -1;
}

absl::StatusOr<KeyPtr> ParseKey(const std::string& text, const File& file) {
  const BioPtr bio = Open(text);
  bool encrypted = false;
  ERR_clear_error();
  KeyPtr key(PEM_read_bio_PrivateKey(bio.get(), nullptr, NoPassphrase, &encrypted));
  ERR_clear_error();
  if (key != nullptr) return key;
  return Refuse(file, "an unencrypted private key in PEM", encrypted ? "an encrypted one" : "none");
}

absl::Time ToTime(const ASN1_TIME* time) {
  std::tm civil{};
  if (ASN1_TIME_to_tm(time, &civil) != 1) return absl::InfinitePast();
  return absl::FromTM(civil, absl::UTCTimeZone());
}

std::string Text(absl::Time time) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", time, absl::UTCTimeZone());
}

std::string SerialOf(const X509* certificate) {
  BIGNUM* const number = ASN1_INTEGER_to_BN(X509_get0_serialNumber(certificate), nullptr);
  char* const hex = number == nullptr ? nullptr : BN_bn2hex(number);
  std::string serial = hex == nullptr ? "" : hex;
  OPENSSL_free(hex);
  BN_free(number);
  return serial;
}

absl::Status CheckUsage(X509* certificate, const File& file, Use use) {
  const bool server = X509_check_purpose(certificate, X509_PURPOSE_SSL_SERVER, 0) == 1;
  const bool client = X509_check_purpose(certificate, X509_PURPOSE_SSL_CLIENT, 0) == 1;
  const std::string found = server   ? "one for servers only"
                            : client ? "one for clients only"
                                     : "one for neither servers nor clients";
  switch (use) {
    case Use::kServer:
      return server ? absl::OkStatus() : Refuse(file, "a certificate for servers", found);
    case Use::kClient:
      return client ? absl::OkStatus() : Refuse(file, "a certificate for clients", found);
    case Use::kPeer:
      return server && client
                 ? absl::OkStatus()
                 : Refuse(file, "a certificate for servers and clients (extended key usage)", found);
  }
  return absl::OkStatus();
}

absl::Status CheckOwn(const Certificates& chain, EVP_PKEY* key, const Files& files, Use use,
                      Material& material) {
  X509* const own = chain.front().get();
  ERR_clear_error();
  const bool match = X509_check_private_key(own, key) == 1;
  ERR_clear_error();
  if (!match) {
    return Refuse(files.key, StrCat("the key of the certificate in ", Name(files.certificate)),
                  "another one");
  }
  material.serial = SerialOf(own);
  material.not_before = ToTime(X509_get0_notBefore(own));
  material.not_after = ToTime(X509_get0_notAfter(own));
  const absl::Time now = absl::Now();
  if (now > material.not_after) {
    return Refuse(files.certificate, "a certificate that is valid now",
                  StrCat("one that expired at ", Text(material.not_after)));
  }
  if (now < material.not_before) {
    return Refuse(files.certificate, "a certificate that is valid now",
                  StrCat("one that is valid from ", Text(material.not_before)));
  }
  return CheckUsage(own, files.certificate, use);
}

// A bundle may hold an old CA beside its successor.
absl::Status CheckCa(const Certificates& ca, const File& file) {
  absl::Time last = absl::InfinitePast();
  for (const CertificatePtr& certificate : ca)
    last = std::max(last, ToTime(X509_get0_notAfter(certificate.get())));
  if (last > absl::Now()) return absl::OkStatus();
  return Refuse(file, "a CA that is valid now", StrCat("none; the last one expired at ", Text(last)));
}

}  // namespace

absl::Status CheckComplete(const Files& files, Use use) {
  const auto missing = [](const File& file, const File& beside) {
    return absl::InvalidArgumentError(
        StrCat(beside.flag, ": expected ", file.flag, " beside it, found none"));
  };
  const bool certificate = !files.certificate.path.empty(), key = !files.key.path.empty(),
             ca = !files.ca.path.empty();
  if (certificate && !key) return missing(files.key, files.certificate);
  if (key && !certificate) return missing(files.certificate, files.key);
  if (use != Use::kClient && ca && !certificate) return missing(files.certificate, files.ca);
  if (use == Use::kPeer && certificate && !ca) return missing(files.ca, files.certificate);
  return absl::OkStatus();
}

absl::StatusOr<Texts> ReadTexts(const Files& files) {
  Texts texts;
  MK_ASSIGN_OR_RETURN(texts.certificate, ReadText(files.certificate));
  MK_ASSIGN_OR_RETURN(texts.key, ReadText(files.key));
  MK_ASSIGN_OR_RETURN(texts.ca, ReadText(files.ca));
  return texts;
}

absl::StatusOr<std::shared_ptr<const Material>> Parse(Texts texts, const Files& files, Use use) {
  MK_RETURN_IF_ERROR(CheckComplete(files, use));
  auto material = std::make_shared<Material>();
  Certificates chain, ca;
  KeyPtr key;
  if (!files.certificate.path.empty()) {
    MK_ASSIGN_OR_RETURN(chain, ParseCertificates(texts.certificate, files.certificate));
    MK_ASSIGN_OR_RETURN(key, ParseKey(texts.key, files.key));
    MK_RETURN_IF_ERROR(CheckOwn(chain, key.get(), files, use, *material));
  }
  if (!files.ca.path.empty()) {
    MK_ASSIGN_OR_RETURN(ca, ParseCertificates(texts.ca, files.ca));
    MK_RETURN_IF_ERROR(CheckCa(ca, files.ca));
  }
  const ContextParts parts{.chain = chain, .key = key.get(), .ca = ca};
  const auto refused = [&](const absl::Status& status) {
    return absl::InvalidArgumentError(StrCat(Name(chain.empty() ? files.ca : files.certificate),
                                             ": OpenSSL refuses it: ", status.message()));
  };
  if (use != Use::kClient) {
    auto context = MakeHttpServerContext(parts);
    if (!context.ok()) return refused(context.status());
    material->http_server = *std::move(context);
  }
  if (use != Use::kServer) {
    auto context = MakeHttpClientContext(parts);
    if (!context.ok()) return refused(context.status());
    material->http_client = *std::move(context);
  }
  material->certificate = std::move(texts.certificate);
  material->key = std::move(texts.key);
  material->ca = std::move(texts.ca);
  return std::shared_ptr<const Material>(std::move(material));
}

absl::StatusOr<std::shared_ptr<const Material>> Load(const Files& files, Use use) {
  MK_RETURN_IF_ERROR(CheckComplete(files, use));
  MK_ASSIGN_OR_RETURN(Texts texts, ReadTexts(files));
  return Parse(std::move(texts), files, use);
}

}  // namespace minke::tls
