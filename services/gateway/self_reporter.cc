#include "services/gateway/self_reporter.h"

#include <utility>

#include "libs/base/mutex.h"
#include "libs/base/thread_name.h"

namespace minke::gateway {

struct SelfReporter::Impl {
  Gateway& gateway;
  registry::Registry& registry;
  Mutex mutex;
  cluster::v1::MemberReport report ABSL_GUARDED_BY(mutex);
  bool draining ABSL_GUARDED_BY(mutex) = false;  // not reported yet
  bool stop ABSL_GUARDED_BY(mutex) = false;
  std::thread thread;

  void Run() {
    SetThreadName("self-report");
    const MutexLock lock(mutex);
    while (!stop) {
      report.mutable_load()->set_running(static_cast<uint32_t>(gateway.active_sequences()));
      report.mutable_load()->set_connections(static_cast<uint32_t>(gateway.connections()));
      draining = false;
      registry.SetReport(report);
      gateway.SetRegistryConnected(registry.connected());
      mutex.AwaitFor(absl::Seconds(1),
                     [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop || draining; });
    }
  }
};

SelfReporter::SelfReporter(Gateway& gateway, registry::Registry& registry, cluster::v1::MemberReport report)
    : impl_(new Impl{.gateway = gateway, .registry = registry}) {
  {
    const MutexLock lock(impl_->mutex);
    impl_->report = std::move(report);
  }
  impl_->thread = std::thread([raw = impl_.get()] { raw->Run(); });
}

SelfReporter::~SelfReporter() {
  {
    const MutexLock lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->thread.join();
}

void SelfReporter::SetDraining() {
  const MutexLock lock(impl_->mutex);
  impl_->report.mutable_member()->set_draining(true);
  impl_->draining = true;
}

}  // namespace minke::gateway
