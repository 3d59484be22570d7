#include <atomic>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/mutex.h"
#include "libs/base/status.h"
#include "libs/base/thread_name.h"
#include "libs/etcd/client.h"

namespace minke::etcd {

namespace {
constexpr absl::Duration kPauseWhileSilent = absl::Milliseconds(200);
}

struct Lease::Impl {
  Client& client;
  const int64_t id;
  const std::function<void()> on_expired;
  mutable Mutex mutex;
  absl::Duration ttl ABSL_GUARDED_BY(mutex);
  absl::Time renewed ABSL_GUARDED_BY(mutex);  // when the last renewal that was answered was asked for
  bool expired ABSL_GUARDED_BY(mutex) = false;
  bool stop ABSL_GUARDED_BY(mutex) = false;
  std::thread thread;

  Impl(Client& client, int64_t id, std::function<void()> on_expired, absl::Duration ttl, absl::Time asked)
      : client(client), id(id), on_expired(std::move(on_expired)), ttl(ttl), renewed(asked) {}
  void Run();
};

void Lease::Impl::Run() {
  SetThreadName("etcd-lease");
  absl::Duration pause;
  {
    const MutexLock lock(mutex);
    pause = ttl / 3;
  }
  while (true) {
    {
      const MutexLock lock(mutex);
      if (mutex.AwaitFor(pause, [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop; })) return;
    }
    const absl::Time asked = absl::Now();
    const absl::StatusOr<absl::Duration> lasts = client.RenewLease(id);
    const MutexLock lock(mutex);
    if (absl::IsNotFound(lasts.status())) {
      expired = true;
      break;
    }
    if (lasts.ok()) {
      renewed = asked;
      ttl = *lasts;
    }
    pause = lasts.ok() ? ttl / 3 : kPauseWhileSilent;
  }
  if (on_expired) on_expired();
}

Lease::Lease(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<Lease>> Lease::Grant(Client& client, absl::Duration ttl,
                                                    std::function<void()> on_expired) {
  const absl::Time asked = absl::Now();
  MK_ASSIGN_OR_RETURN(const int64_t id, client.GrantLease(ttl));
  auto impl = std::make_unique<Impl>(client, id, std::move(on_expired), ttl, asked);
  Impl* raw = impl.get();
  impl->thread = std::thread([raw] { raw->Run(); });
  return std::unique_ptr<Lease>(new Lease(std::move(impl)));
}

Lease::~Lease() {
  bool expired = false;
  {
    const MutexLock lock(impl_->mutex);
    impl_->stop = true;
    expired = impl_->expired;
  }
  impl_->thread.join();
  if (!expired) (void)impl_->client.RevokeLease(impl_->id);  // unreachable: it runs out by itself
}

int64_t Lease::id() const { return impl_->id; }

bool Lease::alive() const {
  const MutexLock lock(impl_->mutex);
  return !impl_->expired && absl::Now() < impl_->renewed + impl_->ttl;
}

bool Lease::expired() const {
  const MutexLock lock(impl_->mutex);
  return impl_->expired;
}

}  // namespace minke::etcd
