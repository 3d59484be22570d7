#include "libs/tls/testing/certificates.h"

#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace minke::tls {
namespace {

template <typename Write>
std::string Pem(const Write& write) {
  BIO* const bio = BIO_new(BIO_s_mem());
  MK_CHECK(write(bio) == 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  std::string text(data, static_cast<size_t>(size));
  BIO_free(bio);
  return text;
}

std::string CertificatePem(X509* certificate) {
  return Pem([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate); });
}

void Extend(X509* certificate, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
  MK_CHECK(extension != nullptr);
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

X509* NewCertificate(EVP_PKEY* key, const std::string& name, int64_t serial, absl::Duration begin,
                     absl::Duration end) {
  X509* const certificate = X509_new();
  X509_set_version(certificate, X509_VERSION_3);
  ASN1_INTEGER_set_int64(X509_get_serialNumber(certificate), serial);
  const auto at = [](absl::Duration from_now) { return absl::ToTimeT(absl::Now() + from_now); };
  ASN1_TIME_set(X509_getm_notBefore(certificate), at(begin));
  ASN1_TIME_set(X509_getm_notAfter(certificate), at(end));
  X509_set_pubkey(certificate, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

}  // namespace

struct TestCa::Impl {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = nullptr;
  int64_t next_serial = 0x1000;
};

TestCa::TestCa(const std::string& name, absl::Duration end) : impl_(std::make_unique<Impl>()) {
  X509* const own = NewCertificate(impl_->key, name, 1, end - absl::Hours(49), end);
  impl_->certificate = own;
  X509_set_issuer_name(own, X509_get_subject_name(own));
  Extend(own, own, NID_basic_constraints, "critical,CA:TRUE");
  Extend(own, own, NID_key_usage, "critical,keyCertSign,cRLSign");
  Extend(own, own, NID_subject_key_identifier, "hash");
  MK_CHECK(X509_sign(own, impl_->key, EVP_sha256()) > 0);
  certificate_ = CertificatePem(own);
}

TestCa::~TestCa() {
  X509_free(impl_->certificate);
  EVP_PKEY_free(impl_->key);
}

Issued TestCa::Issue(const IssueOptions& options) {
  EVP_PKEY* const key = EVP_EC_gen("P-256");
  X509* const certificate = NewCertificate(
      key, "test", options.serial > 0 ? options.serial : impl_->next_serial++, options.begin, options.end);
  X509_set_issuer_name(certificate, X509_get_subject_name(impl_->certificate));
  if (!options.names.empty())
    Extend(certificate, impl_->certificate, NID_subject_alt_name, absl::StrJoin(options.names, ","));
  if (!options.usage.empty()) Extend(certificate, impl_->certificate, NID_ext_key_usage, options.usage);
  Extend(certificate, impl_->certificate, NID_authority_key_identifier, "keyid");
  MK_CHECK(X509_sign(certificate, impl_->key, EVP_sha256()) > 0);
  Issued issued;
  issued.certificate = CertificatePem(certificate);
  issued.key = Pem([&](BIO* bio) {
    return PEM_write_bio_PKCS8PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  });
  issued.encrypted_key = Pem([&](BIO* bio) {
    return PEM_write_bio_PKCS8PrivateKey(bio, key, EVP_aes_128_cbc(), "passphrase", 10, nullptr, nullptr);
  });
  X509_free(certificate);
  EVP_PKEY_free(key);
  return issued;
}

CertificateFolder::CertificateFolder()
    : folder_((std::filesystem::temp_directory_path() / "minke-tls-XXXXXX").string()) {
  MK_CHECK(::mkdtemp(folder_.data()) != nullptr);
}

CertificateFolder::~CertificateFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void CertificateFolder::Write(const std::string& name, const std::string& text) const {
  std::ofstream file(path(name), std::ios::trunc | std::ios::binary);
  file << text;
  file.close();
  MK_CHECK(file.good());
}

void CertificateFolder::WriteAll(const TestCa& ca, const Issued& issued) const {
  Write("ca.pem", ca.certificate());
  Write("key.pem", issued.key);
  Write("cert.pem", issued.certificate);
}

}  // namespace minke::tls
