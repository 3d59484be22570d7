// A CA for tests, and certificates of every kind that it issues, valid or not.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace minke::tls {

struct IssueOptions {
  std::vector<std::string> names = {"DNS:localhost", "IP:127.0.0.1"};  // subject alternative names
  std::string usage = "serverAuth,clientAuth";                         // extended key usage; empty: none said
  absl::Duration begin = -absl::Hours(1), end = absl::Hours(24);       // from now on
  int64_t serial = 0;                                                  // 0: the next one
};

struct Issued {
  std::string certificate, key;  // PEM
  std::string encrypted_key;     // the same with a passphrase
};

// Every function aborts the test program when OpenSSL fails. Single-threaded.
class TestCa {
 public:
  explicit TestCa(const std::string& name = "test CA", absl::Duration end = absl::Hours(48));
  ~TestCa();
  const std::string& certificate() const { return certificate_; }
  Issued Issue(const IssueOptions& options = {});

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
  std::string certificate_;
};

// A folder with cert.pem, key.pem and ca.pem in it, removed at the end.
class CertificateFolder {
 public:
  CertificateFolder();
  ~CertificateFolder();
  CertificateFolder(const CertificateFolder&) = delete;
  CertificateFolder& operator=(const CertificateFolder&) = delete;

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  void Write(const std::string& name, const std::string& text) const;  // in place, not as a whole
  void WriteAll(const TestCa& ca, const Issued& issued) const;

 private:
  std::string folder_;
};

}  // namespace minke::tls
