#include "libs/registry/static_registry.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/mutex.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/rpc/connect.h"
#include "libs/rpc/credentials.h"
#include "libs/rpc/grpc_server.h"
#include "proto/cluster/cluster.grpc.pb.h"

namespace minke::registry {
namespace {

using cluster::v1::ClusterUpdate;
using cluster::v1::MemberReport;
using cluster::v1::Membership;

constexpr absl::Duration kReconnectPause = absl::Milliseconds(200);
constexpr absl::Duration kFirstLease = absl::Seconds(3);

}  // namespace

struct StaticRegistry::Impl {
  std::string router_address;
  std::shared_ptr<tls::Identity> identity;  // shared with the process's other connections
  OnUpdate on_update;
  OnRefused on_refused;

  Mutex mutex;
  MemberReport report ABSL_GUARDED_BY(mutex);
  uint64_t version ABSL_GUARDED_BY(mutex) = 0;
  bool stop ABSL_GUARDED_BY(mutex) = false;
  grpc::ClientContext* context ABSL_GUARDED_BY(mutex) = nullptr;
  std::atomic<bool> connected{false};
  std::thread thread;

  void Run();
  grpc::Status RunOnce(Membership::Stub& stub);
};

// One stream: this thread reads, a second one writes reports.
grpc::Status StaticRegistry::Impl::RunOnce(Membership::Stub& stub) {
  grpc::ClientContext context_here;
  {
    const MutexLock lock(mutex);
    if (stop) return grpc::Status::CANCELLED;
    context = &context_here;
  }
  auto stream = stub.Join(&context_here);
  std::atomic<int64_t> lease_ms{absl::ToInt64Milliseconds(kFirstLease)};
  std::atomic<int64_t> heard_ms{absl::ToUnixMillis(absl::Now())};
  std::atomic<bool> done{false};
  std::thread writer([&] {
    uint64_t sent = 0;
    while (!done.load()) {
      MemberReport copy;
      {
        const MutexLock lock(mutex);
        const auto changed = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
          return version != sent || stop || done.load();
        };
        mutex.AwaitFor(absl::Milliseconds(lease_ms.load() / 3), changed);
        if (stop) context_here.TryCancel();
        if (stop || done.load()) break;
        copy = report;
        sent = version;
      }
      // A router that says nothing for two leases is gone, whatever the connection says.
      if (absl::ToUnixMillis(absl::Now()) - heard_ms.load() > 2 * lease_ms.load()) context_here.TryCancel();
      if (!stream->Write(copy)) break;
    }
  });
  ClusterUpdate update;
  while (stream->Read(&update)) {
    connected.store(true);
    heard_ms.store(absl::ToUnixMillis(absl::Now()));
    if (update.lease_ms() > 0) lease_ms.store(update.lease_ms());
    if (update.has_view() || update.statuses_size() > 0) on_update(update);
  }
  connected.store(false);
  done.store(true);
  {
    const MutexLock lock(mutex);  // wakes the writer: its condition looks at `done`
    context = nullptr;
  }
  writer.join();
  return stream->Finish();
}

void StaticRegistry::Impl::Run() {
  SetThreadName("registry");
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 5000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 3000);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  rpc::SecureChannel router(router_address, identity, arguments);
  bool complained = false;
  while (true) {
    const auto stopped = [this] {
      const MutexLock lock(mutex);
      return stop;
    };
    const std::shared_ptr<grpc::Channel> channel = router.Get();
    grpc::Status status = rpc::ToGrpc(rpc::Connect(*channel, kFirstLease, stopped));
    if (status.ok()) status = RunOnce(*Membership::NewStub(channel));
    {
      const MutexLock lock(mutex);
      if (stop) return;
    }
    if (status.error_code() == grpc::StatusCode::INVALID_ARGUMENT) {
      on_refused(rpc::ToAbsl(status));
    } else if (!complained) {
      log::Warning("registry", StrCat("router=", router_address, " not reachable: ", status.error_message(),
                                      "; trying again"));
    }
    complained = true;
    const MutexLock lock(mutex);
    if (mutex.AwaitFor(kReconnectPause, [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop; })) return;
  }
}

StaticRegistry::StaticRegistry(std::string router_address, std::shared_ptr<tls::Identity> identity,
                               MemberReport report, OnUpdate on_update, OnRefused on_refused)
    : impl_(std::make_unique<Impl>()) {
  impl_->router_address = std::move(router_address);
  impl_->identity = std::move(identity);
  impl_->on_update = std::move(on_update);
  impl_->on_refused = std::move(on_refused);
  {
    const MutexLock lock(impl_->mutex);
    impl_->report = std::move(report);
    impl_->version = 1;
  }
  impl_->thread = std::thread([raw = impl_.get()] { raw->Run(); });
}

StaticRegistry::~StaticRegistry() {
  {
    const MutexLock lock(impl_->mutex);
    impl_->stop = true;
    if (impl_->context != nullptr) impl_->context->TryCancel();
  }
  impl_->thread.join();
}

void StaticRegistry::SetReport(MemberReport report) {
  const MutexLock lock(impl_->mutex);
  if (report.SerializeAsString() == impl_->report.SerializeAsString()) return;
  impl_->report = std::move(report);
  ++impl_->version;
}

bool StaticRegistry::connected() const { return impl_->connected.load(); }

}  // namespace minke::registry
