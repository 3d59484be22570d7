#include "services/gateway/keys/api_keys.h"

#include <openssl/sha.h>
#include <sys/stat.h>

#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

constexpr std::chrono::seconds kLookPeriod{1};

std::string Digest(std::string_view key) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

// Empty if there is none.
std::string_view BearerOf(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  if (authorization.size() <= kScheme.size()) return {};
  for (size_t i = 0; i < kScheme.size(); ++i) {
    if (absl::ascii_tolower(static_cast<unsigned char>(authorization[i])) != kScheme[i]) return {};
  }
  return StdView(absl::StripAsciiWhitespace(AbslView(authorization.substr(kScheme.size()))));
}

}  // namespace

absl::Status ApiKeys::Unreadable() const {
  return absl::NotFoundError(StrCat(path_, ": expected a file of ",
                                    kind_ == KeyKind::kApiKey ? "API keys" : "operator tokens",
                                    ", found none that can be read"));
}

absl::StatusOr<ApiKeys::Version> ApiKeys::FileVersion() const {
  struct stat found {};
  if (::stat(path_.c_str(), &found) != 0) return Unreadable();
  return Version{std::chrono::seconds(found.st_mtim.tv_sec) + std::chrono::nanoseconds(found.st_mtim.tv_nsec),
                 found.st_ino, static_cast<uint64_t>(found.st_size)};
}

absl::StatusOr<std::shared_ptr<ApiKeys>> ApiKeys::Load(std::string path, KeyKind kind) {
  std::shared_ptr<ApiKeys> keys(new ApiKeys(std::move(path), kind));
  const MutexLock lock(keys->mutex_);
  MK_RETURN_IF_ERROR(keys->ReadLocked());
  return keys;
}

absl::Status ApiKeys::ReadLocked() {
  looked_ = std::chrono::steady_clock::now();
  MK_ASSIGN_OR_RETURN(const Version version, FileVersion());
  version_ = version;  // also of one with an error, which is told once
  std::ifstream file(path_, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) return Unreadable();
  absl::StatusOr<std::vector<KeyEntry>> entries = ParseKeys(text, kind_);
  if (!entries.ok())
    return absl::Status(entries.status().code(), absl::StrCat(path_, ": ", entries.status().message()));
  // An account goes on where its key, name and limits are the same.
  Accounts accounts;
  for (KeyEntry& entry : *entries) {
    std::string digest = Digest(entry.key);
    const auto old = accounts_.find(digest);
    const bool same =
        old != accounts_.end() && old->second->name() == entry.name && old->second->limits() == entry.limits;
    accounts[std::move(digest)] =
        same ? old->second : std::make_shared<KeyAccount>(std::move(entry.name), entry.limits);
  }
  accounts_ = std::move(accounts);
  return absl::OkStatus();
}

void ApiKeys::ReadAgainIfChangedLocked() {
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_ < kLookPeriod) return;
  looked_ = now;
  const absl::StatusOr<Version> version = FileVersion();
  if (version.ok() && *version == version_) return;
  if (!version.ok() && version_ == Version{}) return;  // told before
  const absl::Status read = version.ok() ? ReadLocked() : version.status();
  if (!version.ok()) version_ = {};
  if (read.ok()) {
    log::Info("gateway/keys", "the key file has changed", {{"file", path_}, {"keys", accounts_.size()}});
  } else {
    log::Warning("gateway/keys", "the key file has changed, and the keys stay as they were",
                 {{"error", StdView(read.message())}});
  }
}

std::shared_ptr<KeyAccount> ApiKeys::Find(std::string_view authorization) {
  const std::string_view key = BearerOf(authorization);
  const std::string digest = key.empty() ? "" : Digest(key);
  const MutexLock lock(mutex_);
  ReadAgainIfChangedLocked();
  if (key.empty()) return nullptr;
  const auto found = accounts_.find(digest);
  return found == accounts_.end() ? nullptr : found->second;
}

void ApiKeys::Collect(telemetry::Page& page) const {
  std::vector<std::shared_ptr<KeyAccount>> accounts;
  {
    const MutexLock lock(mutex_);
    for (const auto& [digest, account] : accounts_) accounts.push_back(account);
  }
  for (const auto& account : accounts) account->Collect(page);
}

}  // namespace minke::gateway
