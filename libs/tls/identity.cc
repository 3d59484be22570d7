#include "libs/tls/identity.h"

#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"

namespace minke::tls {
namespace {

constexpr char kTag[] = "tls";

std::string Until(const Material& material) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", material.not_after, absl::UTCTimeZone());
}

}  // namespace

absl::StatusOr<std::shared_ptr<Identity>> Identity::Open(Files files, Use use, IdentityOptions options) {
  MK_RETURN_IF_ERROR(CheckComplete(files, use));
  MK_ASSIGN_OR_RETURN(Texts texts, ReadTexts(files));
  std::shared_ptr<Identity> identity(new Identity(std::move(files), use, std::move(options)));
  identity->used_ = identity->seen_ = texts;
  MK_ASSIGN_OR_RETURN(identity->current_, Parse(std::move(texts), identity->files_, use));
  identity->WarnIfItEndsSoon(*identity->current());
  identity->thread_ = std::thread([raw = identity.get()] { raw->Run(); });
  return identity;
}

Identity::~Identity() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<const Material> Identity::current() const {
  const MutexLock lock(mutex_);
  return current_;
}

void Identity::Run() {
  SetThreadName("tls-files");
  while (true) {
    {
      const MutexLock lock(mutex_);
      if (mutex_.AwaitFor(options_.period, [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stop_; }))
        return;
    }
    Look();
    WarnIfItEndsSoon(*current());
  }
}

void Identity::Look() {
  absl::StatusOr<Texts> texts = ReadTexts(files_);
  if (!texts.ok()) {
    // Between the removal of a file and its successor there is none for a moment.
    std::string reason(texts.status().message());
    if (reason == failing_) WarnOnce(reason);
    failing_ = std::move(reason);
    return;
  }
  failing_.clear();
  const bool settled = *texts == seen_;
  seen_ = *texts;
  if (settled && *texts != used_) Take(*std::move(texts));
}

void Identity::Take(Texts texts) {
  used_ = texts;  // tried once: not again until something changes
  auto material = Parse(std::move(texts), files_, use_);
  if (!material.ok()) return WarnOnce(std::string(material.status().message()));
  warned_.clear();
  log::Info(kTag, (*material)->serial.empty()
                      ? StrCat(files_.ca.flag, " ", files_.ca.path, " was replaced")
                      : StrCat(files_.certificate.flag, " ", files_.certificate.path,
                               " was replaced: serial=", (*material)->serial, " until=", Until(**material)));
  const MutexLock lock(mutex_);
  current_ = *std::move(material);
}

void Identity::WarnOnce(std::string message) {
  if (message == warned_) return;
  log::Warning(kTag, StrCat(message, "; what was there before stays in use"));
  warned_ = std::move(message);
}

// Whoever renews certificates does so well before the last tenth of their time.
void Identity::WarnIfItEndsSoon(const Material& material) {
  if (material.serial.empty() || material.serial == ending_) return;
  const absl::Duration left = material.not_after - absl::Now();
  if (left > (material.not_after - material.not_before) / 10) return;
  log::Warning(kTag, StrCat(files_.certificate.flag, " ", files_.certificate.path, " ends at ",
                            Until(material), ": it has not been replaced"));
  ending_ = material.serial;
}

}  // namespace minke::tls
